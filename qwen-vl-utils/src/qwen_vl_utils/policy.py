"""What may be fetched and decoded, and what it may cost.

    MediaPolicy --start--> Deadline        one for each medium; fetching and decoding share it
    scheme, host, address, path --check_*--> allowed, or MediaRefused
    bytes, pixels, frames, seconds --check_*--> small enough, or MediaRefused

`PERMISSIVE` is the default of every function, for scripts whose author chose the media. A server that takes
URLs or paths from strangers passes `MediaPolicy.strict()`.
"""

import ipaddress
import math
import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import MediaRefused, MediaTimeout

SCHEMES = frozenset({"http", "https", "file", "data"})

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

# Python's own tables grew over its releases, so what they may lack stands here: tunnels (6to4, Teredo) that
# lead to any IPv4 address, old and new blocks for sites, documentation and segment routing, and the address
# at which every machine of one cloud finds its host, which is public by its number only.
NEVER_PUBLIC = tuple(
    ipaddress.ip_network(block)
    for block in (
        "192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32", "::/96",
        "64:ff9b:1::/48", "100::/64", "2001::/23", "2002::/16", "3fff::/20", "5f00::/16", "fec0::/10",
    )
)  # fmt: skip
NAT64 = ipaddress.ip_network("64:ff9b::/96")


@dataclass(frozen=True, kw_only=True)
class MediaPolicy:
    """What may be fetched and decoded, and at what cost; `MediaPolicy()` is `PERMISSIVE`.

    Pictures, arrays and bytes that the caller holds already are always allowed; the limits hold for them too.
    Raises ValueError for a field that can't be; the message names it.
    """

    schemes: frozenset[str] = SCHEMES
    """Of "http", "https", "file", "data"; a plain path counts as "file"."""
    domains: tuple[str, ...] | None = None
    """Hosts of URLs: "example.com" is that host alone, "*.example.com" everything below it; None is any."""
    folders: tuple[Path, ...] | None = None
    """Where local files may lie once links and ".." are followed; None is anywhere."""
    networks: tuple[str, ...] | None = None
    """Networks reached besides the public internet, as "10.1.0.0/16"; None is any address."""
    redirects: int = 30
    """Redirects followed; each is checked as the first address was."""
    max_bytes: int = 4 * 2**30
    """Of one file, download or data URL, once decompressed."""
    max_pixels: int = 178_956_970
    """Width times height of one picture or one frame of a source, read before decoding."""
    max_frames: int = 100_000
    """Frames taken from one video, or the length of a list of frames."""
    max_video_seconds: float = 7 * 86_400.0
    """Length of the source of a video."""
    max_media: int = 100_000
    """Pictures and videos in one call."""
    stall_seconds: float = 120.0
    """Without a byte from a server or a sign of life from a decoder."""
    total_seconds: float = 3600.0
    """For one medium, fetched and decoded."""
    formats: tuple[str, ...] | None = None
    """Picture formats by Pillow's names; None is all but EPS, which Pillow hands to another program."""

    def __post_init__(self) -> None:
        def put(field: str, value: Any) -> None:
            object.__setattr__(self, field, value)

        put("schemes", frozenset(scheme.lower() for scheme in _texts("schemes", self.schemes)))
        if unknown := self.schemes - SCHEMES:
            raise ValueError(f"schemes: {sorted(unknown)} unknown; choose among {sorted(SCHEMES)}")
        if self.domains is not None:
            put("domains", tuple(_domain(domain) for domain in _texts("domains", self.domains)))
        if self.folders is not None:
            put("folders", tuple(_folder(folder) for folder in _items("folders", self.folders)))
        if self.networks is not None:
            put("networks", tuple(_network(network) for network in _texts("networks", self.networks)))
        if self.formats is not None:
            put("formats", tuple(name.upper() for name in _texts("formats", self.formats)))
        _whole("redirects", self.redirects, least=0)
        for field in ("max_bytes", "max_pixels", "max_frames", "max_media"):
            _whole(field, getattr(self, field), least=1)
        for field in ("max_video_seconds", "stall_seconds", "total_seconds"):
            _seconds(field, getattr(self, field))

    @classmethod
    def strict(
        cls,
        *,
        domains: Iterable[str] | None = None,
        folders: Iterable[str | Path] = (),
        networks: Iterable[str] = (),
        **changes: Any,
    ) -> "MediaPolicy":
        """A policy for servers that take media from strangers.

        `https` from any public host and `data:` URLs. `domains` narrows the hosts (an empty list allows
        none), `folders` allows local files inside them, `networks` reaches private networks. `changes` are
        fields of MediaPolicy, for instance `redirects=3` or `schemes={"data"}`.
        """
        preset = {
            "schemes": {"https", "data", "file"}
            if (inside := _items("folders", folders))
            else {"https", "data"},
            "domains": domains,
            "folders": inside,
            "networks": networks,
            "redirects": 0,
            "max_bytes": 64 * 2**20,
            "max_pixels": 8192 * 8192,
            "max_frames": 768,
            "max_video_seconds": 3600.0,
            "max_media": 64,
            "stall_seconds": 10.0,
            "total_seconds": 60.0,
            "formats": ("BMP", "GIF", "JPEG", "MPO", "PNG", "WEBP"),
        }
        return cls(**(preset | changes))

    def start(self) -> "Deadline":
        """The clock of one medium, running from now."""
        return Deadline(self.total_seconds, self.stall_seconds, time.monotonic() + self.total_seconds)

    def check_scheme(self, scheme: str, name: str) -> None:
        """Raise MediaRefused unless `scheme` is allowed."""
        if scheme not in self.schemes:
            allowed = ", ".join(sorted(self.schemes)) or "none"
            raise MediaRefused(
                f"{name}: the policy's schemes are {allowed}, not {scheme}; send the medium another way, or "
                f"add {scheme!r} to MediaPolicy.schemes"
            )

    def check_host(self, host: str, name: str) -> None:
        """Raise MediaRefused unless the host of a URL is among `domains`."""
        if self.domains is None:
            return
        try:
            plain = plain_host(host)
        except ValueError:
            plain = ""
        if not plain or not any(_matches(plain, domain) for domain in self.domains):
            raise MediaRefused(
                f"{name}: the host {host!r} is not among the policy's domains; use an allowed host, or add "
                "it to MediaPolicy.domains"
            )

    def check_address(self, address: str, name: str) -> None:
        """Raise MediaRefused for an IP address that is neither public nor in `networks`."""
        if self.networks is None:
            return
        found = ipaddress.ip_address(address.partition("%")[0])
        inner = _embedded(found)
        for network in self.networks:
            allowed = ipaddress.ip_network(network)
            # `in` is False where the versions differ
            if found in allowed or (inner is not None and inner in allowed):
                return
        if not is_public(found):
            raise MediaRefused(
                f"{name}: its host has the address {address}, which is not public; use a public host, or add "
                "its network to MediaPolicy.networks"
            )

    def check_path(self, path: Path, name: str) -> Path:
        """`path` absolute; where `folders` are set, the real path, which must lie inside one of them."""
        if self.folders is None:
            return path.absolute()
        try:
            real = Path(os.path.realpath(path))
        except (OSError, ValueError) as error:
            raise MediaRefused(f"{name}: not a path that can be followed: {error}") from error
        if not any(real.is_relative_to(folder) for folder in self.folders):
            raise MediaRefused(
                f"{name}: it lies outside of the policy's folders; move it inside, or add its folder to "
                "MediaPolicy.folders"
            )
        return real

    def check_format(self, found: str | None, name: str) -> None:
        """Raise MediaRefused for a picture format (Pillow's name) that is not allowed."""
        allowed = found != "EPS" if self.formats is None else found in self.formats
        if not allowed:
            raise MediaRefused(
                f"{name}: a picture of the format {found}, which the policy's formats leave out; convert it "
                f"to PNG or JPEG, or add {found!r} to MediaPolicy.formats"
            )

    def check_size(self, width: int, height: int, name: str) -> None:
        """Raise MediaRefused for a picture or a frame of too many pixels."""
        if width * height > self.max_pixels:
            found = f"{width} x {height} = {width * height} pixels"
            raise _too_much(name, found, "max_pixels", self.max_pixels, "scale it down")

    def check_frames(self, count: int, name: str) -> None:
        """Raise MediaRefused for too many frames of one video."""
        if count > self.max_frames:
            remedy = "take fewer with 'nframes', 'fps' or 'max_frames'"
            raise _too_much(name, f"{count} frames", "max_frames", self.max_frames, remedy)

    def check_seconds(self, seconds: float, name: str) -> None:
        """Raise MediaRefused for a video that runs too long (or whose length is no number)."""
        if not seconds <= self.max_video_seconds:
            found = f"a video of {seconds:.1f} seconds"
            raise _too_much(name, found, "max_video_seconds", self.max_video_seconds, "cut it")

    def check_bytes(self, count: int, name: str) -> None:
        """Raise MediaRefused for too large a file, download or data URL."""
        if count > self.max_bytes:
            remedy = "send a smaller file"
            raise _too_much(name, f"{count} bytes or more", "max_bytes", self.max_bytes, remedy)

    def check_media(self, count: int) -> None:
        """Raise MediaRefused for too many pictures and videos in one call."""
        if count > self.max_media:
            remedy = "send fewer at a time"
            raise _too_much(
                "the messages", f"{count} pictures and videos", "max_media", self.max_media, remedy
            )


@dataclass(frozen=True)
class Deadline:
    """The clock of one medium."""

    total_seconds: float
    stall_seconds: float
    """How long to wait for a sign of life."""
    ends: float
    """When it is over, on `time.monotonic`."""

    def left(self, name: str) -> float:
        """Seconds left, above 0. Raises MediaTimeout, naming the medium, when there are none."""
        left = self.ends - time.monotonic()
        if left <= 0:
            raise self.over(name)
        return left

    def wait(self, name: str) -> float:
        """How long to wait for the next sign of life [seconds]; raises as `left` does."""
        return min(self.stall_seconds, self.left(name))

    def after(self, waited: float, name: str) -> MediaTimeout:
        """The error to raise when a `wait` of `waited` seconds brought nothing."""
        return self.over(name) if waited < self.stall_seconds else self.stalled(name)

    def over(self, name: str) -> MediaTimeout:
        """The error to raise when the medium took too long."""
        return MediaTimeout(
            f"{name}: not there after the policy's total_seconds of {self.total_seconds:g}; use a smaller "
            "file or a faster source, or raise MediaPolicy.total_seconds"
        )

    def stalled(self, name: str) -> MediaTimeout:
        """The error to raise when there was no sign of life."""
        return MediaTimeout(
            f"{name}: no sign of life for the policy's stall_seconds of {self.stall_seconds:g}; try again "
            "later, or raise MediaPolicy.stall_seconds"
        )


def plain_host(host: str) -> str:
    """`host` as it is compared: lower case, no dot at the end, ASCII; IP addresses in their usual spelling.

    Raises ValueError where it is no host name.
    """
    host = host.lower().removesuffix(".")
    try:
        return str(ipaddress.ip_address(host.removeprefix("[").removesuffix("]")))
    except ValueError:
        plain = host.encode("idna").decode()
    # Python knows the IDNA of 2003, which turns "ß" into "ss": another name than browsers and requests reach
    if not host.isascii() and plain.encode().decode("idna") != host:
        raise ValueError(f"{host!r} has more than one ASCII form; write the one you mean, xn--...")
    if not plain or not all(char.isalnum() or char in "-_." for char in plain):
        raise ValueError(f"{host!r} is no host name")
    return plain


def is_public(address: IPAddress) -> bool:
    """Whether `address` belongs to the public internet; one that spells an IPv4 address is judged by that."""
    if (inner := _embedded(address)) is not None:
        return is_public(inner)
    return (
        address.is_global
        and not address.is_multicast
        and not address.is_reserved
        and not any(address in block for block in NEVER_PUBLIC)
    )


def _embedded(address: IPAddress) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 address only spells: mapped, or translated by NAT64."""
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address in NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped


def _matches(host: str, domain: str) -> bool:
    return host.endswith(domain[1:]) if domain.startswith("*.") else host == domain


def _too_much(name: str, found: str, field: str, limit: float, remedy: str) -> MediaRefused:
    return MediaRefused(
        f"{name}: {found}, above the policy's {field} of {limit}; {remedy}, or raise MediaPolicy.{field}"
    )


def _items(field: str, values: Any) -> list[Any]:
    if isinstance(values, (str, bytes, Path)) or not isinstance(values, Iterable):
        raise ValueError(f"{field} must be a list, got {values!r}; write [{values!r}]")
    return list(values)


def _texts(field: str, values: Any) -> list[str]:
    items = _items(field, values)
    for item in items:
        if not isinstance(item, str) or not item:
            raise ValueError(f"{field} must hold non-empty strings, got {item!r}")
    return items


def _domain(domain: str) -> str:
    wild = "*." if domain.startswith("*.") else ""
    try:
        return wild + plain_host(domain.removeprefix("*."))
    except ValueError as error:
        raise ValueError(
            f"domains: {domain!r} is not a host: {error}; write 'example.com' or '*.example.com', without "
            "scheme, port or path"
        ) from error


def _folder(folder: Any) -> Path:
    if not isinstance(folder, (str, Path)) or not str(folder):
        raise ValueError(f"folders must hold paths, got {folder!r}")
    return Path(os.path.realpath(folder))


def _network(network: str) -> str:
    try:
        return str(ipaddress.ip_network(network))
    except ValueError as error:
        raise ValueError(f"networks: {error}; write '10.1.0.0/16' or '192.168.1.7'") from error


def _whole(field: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{field} must be a whole number of at least {least}, got {value!r}")


def _seconds(field: str, value: Any) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not 0 < value <= threading.TIMEOUT_MAX:
        raise ValueError(f"{field} must be a positive, finite number of seconds, got {value!r}")


PERMISSIVE = MediaPolicy()
"""The default: what 0.0.14 would open, with limits that no honest file meets."""

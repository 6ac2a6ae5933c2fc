"""The media policy: what it validates, what it lets through, and how it says no."""

import dataclasses
import ipaddress
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from qwen_vl_utils.errors import MediaError, MediaRefused, MediaTimeout
from qwen_vl_utils.media import describe
from qwen_vl_utils.policy import PERMISSIVE, MediaPolicy, is_public, plain_host

label = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True).filter(
    lambda text: not text.startswith("xn--") and not text.isdecimal()
)
host = st.lists(label, min_size=1, max_size=4).map(".".join)


def allows(policy: MediaPolicy, name: str) -> bool:
    try:
        policy.check_host(name, "x")
    except MediaRefused:
        return False
    return True


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("schemes", {"ftp"}, r"schemes: \['ftp'\] unknown; choose among \['data', 'file', 'http', 'https'\]"),
        ("schemes", "https", "schemes must be a list, got 'https'"),
        ("schemes", [7], "schemes must hold non-empty strings, got 7"),
        ("domains", "example.com", "domains must be a list, got 'example.com'"),
        ("domains", ["https://example.com"], "domains: 'https://example.com' is not a host"),
        ("domains", ["example.com:443"], "domains: 'example.com:443' is not a host"),
        ("domains", ["exa mple.com"], "domains: 'exa mple.com' is not a host"),
        ("domains", ["user@example.com"], "domains: 'user@example.com' is not a host"),
        ("domains", ["*"], r"domains: '\*' is not a host"),
        ("domains", ["a.*.example.com"], "domains: .* is not a host"),
        ("domains", ["straße.de"], "domains: 'straße.de' is not a host: .* more than one ASCII form"),
        ("domains", [""], "domains must hold non-empty strings, got ''"),
        ("folders", "/data", "folders must be a list, got '/data'"),
        ("folders", [3], "folders must hold paths, got 3"),
        ("folders", [""], "folders must hold paths, got ''"),
        ("networks", ["10.0.0.1/8"], "networks: 10.0.0.1/8 has host bits set"),
        ("networks", ["office"], "networks: 'office' does not appear to be"),
        ("formats", "PNG", "formats must be a list, got 'PNG'"),
        ("redirects", -1, "redirects must be a whole number of at least 0, got -1"),
        ("max_bytes", 0, "max_bytes must be a whole number of at least 1, got 0"),
        ("max_bytes", 1.5, "max_bytes must be a whole number"),
        ("max_pixels", True, "max_pixels must be a whole number"),
        ("max_frames", "9", "max_frames must be a whole number"),
        ("max_media", None, "max_media must be a whole number"),
        ("max_video_seconds", float("inf"), "max_video_seconds must be a positive, finite number"),
        ("stall_seconds", 0, "stall_seconds must be a positive, finite number of seconds, got 0"),
        ("total_seconds", float("nan"), "total_seconds must be a positive, finite number"),
    ],
)
def test_a_field_that_cannot_be_is_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        MediaPolicy(**{field: value})
    with pytest.raises(ValueError, match=message):
        MediaPolicy.strict(**{field: value})


def test_fields_are_kept_in_one_form(tmp_path):
    policy = MediaPolicy(
        schemes=["HTTPS"],
        domains=["Example.COM.", "*.BÜCHER.example"],
        folders=[tmp_path, str(tmp_path / "a" / "..")],
        networks=["10.1.0.0/16", "::1"],
        formats=["png"],
    )
    assert policy.schemes == {"https"}
    assert policy.domains == ("example.com", "*.xn--bcher-kva.example")
    assert policy.folders == (Path(os.path.realpath(tmp_path)),) * 2
    assert policy.networks == ("10.1.0.0/16", "::1/128")
    assert policy.formats == ("PNG",)
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert dataclasses.replace(policy, max_media=3).max_media == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.max_media = 9


def test_the_default_opens_what_the_old_release_opened(tmp_path):
    assert MediaPolicy() == PERMISSIVE
    for scheme in ("http", "https", "file", "data"):
        PERMISSIVE.check_scheme(scheme, "x")
    assert allows(PERMISSIVE, "anything at all")
    PERMISSIVE.check_address("169.254.169.254", "x")
    assert PERMISSIVE.check_path(tmp_path, "x") == tmp_path
    PERMISSIVE.check_size(13_000, 13_000, "x")


def test_the_strict_preset_adds_only_what_it_is_told(tmp_path):
    assert MediaPolicy.strict().schemes == {"https", "data"}
    assert MediaPolicy.strict(folders=[tmp_path]).schemes == {"https", "data", "file"}
    assert MediaPolicy.strict(folders=[tmp_path], schemes={"file"}).schemes == {"file"}
    assert allows(MediaPolicy.strict(), "example.com")
    # an allow-list read from an empty setting allows nothing; it does not allow everything
    assert not allows(MediaPolicy.strict(domains=[]), "example.com")
    with pytest.raises(MediaRefused, match=r"x: the policy's schemes are data, https, not http; .*schemes"):
        MediaPolicy.strict().check_scheme("http", "x")
    MediaPolicy.strict(networks=["10.0.0.0/8"]).check_address("10.9.9.9", "x")
    with pytest.raises(TypeError, match="max_byte"):
        MediaPolicy.strict(max_byte=3)


@given(host, host, label)
def test_domains_match_whole_labels(domain, other, sub):
    exact, below = MediaPolicy(domains=[domain]), MediaPolicy(domains=[f"*.{domain}"])
    assert allows(exact, domain) and allows(exact, domain.upper() + ".")
    assert allows(below, f"{sub}.{domain}") and allows(below, f"{other}.{sub}.{domain}")
    assert not allows(below, domain)
    assert not allows(exact, f"{sub}.{domain}")
    assume(not domain.endswith("zz9"))
    for wrong in (f"{sub}{domain}", f"{sub}-{domain}", f"{domain}.{other}.zz9"):
        assert not allows(exact, wrong) and not allows(below, wrong)


@given(host, host)
def test_a_host_is_allowed_only_by_its_own_domains(domain, name):
    assume(name != domain and not name.endswith("." + domain))
    assert not allows(MediaPolicy(domains=[domain, f"*.{domain}"]), name)


@given(st.text(max_size=20))
def test_no_text_slips_through_a_list_of_domains(text):
    """Whatever is taken for a host either is refused or compares equal to the allowed one."""
    if allows(MediaPolicy(domains=["example.com", "*.example.com"]), text):
        assert re.fullmatch(r"([^.]+\.)*example\.com", plain_host(text))


@pytest.mark.parametrize(
    "name",
    ["", ".", "a..example.com", "example.com\0", "example.com/", "a@example.com", "x" * 70 + ".example.com"],
)
def test_what_is_no_host_name_matches_nothing(name):
    assert not allows(MediaPolicy(domains=["*.example.com", "example.com"]), name)


def test_addresses_can_be_domains():
    policy = MediaPolicy(domains=["127.0.0.1", "[::1]"])
    assert allows(policy, "127.0.0.1") and allows(policy, "0:0:0:0:0:0:0:1")
    assert not allows(policy, "2130706433") and not allows(policy, "127.0.0.2")


PRIVATE = """
0.0.0.0 0.1.2.3 10.0.0.1 100.64.0.1 100.100.100.200 127.0.0.1 127.255.255.254 169.254.169.254 172.16.0.1
192.0.0.192 192.0.2.1 192.88.99.1 192.168.1.1 198.18.0.1 224.0.0.1 239.1.1.1 240.0.0.1 255.255.255.255
168.63.129.16 :: ::1 ::127.0.0.1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 64:ff9b::7f00:1 64:ff9b::a9fe:a9fe
64:ff9b:1::808:808 100::1 2001::1 2001:db8::1 2002:7f00:1:: 2002:808:808:: 3fff::1 5f00::1 fc00::1
fd00:ec2::254 fe80::1 fe80::1%eth0 fec0::1 ff02::1
""".split()
PUBLIC = (
    "1.1.1.1 8.8.8.8 172.32.0.1 192.0.1.1 ::ffff:8.8.8.8 64:ff9b::808:808 2606:4700::1111 2a00::1".split()
)


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_not_public_are_refused(address):
    with pytest.raises(MediaRefused, match=f"x: its host has the address {address}, which is not public"):
        MediaPolicy(networks=()).check_address(address, "x")


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_allowed(address):
    MediaPolicy(networks=()).check_address(address, "x")


@given(st.ip_addresses(v=4))
def test_an_address_is_judged_the_same_however_ipv6_spells_it(address):
    for spelled in (f"::ffff:{address}", str(ipaddress.ip_address("64:ff9b::") + int(address))):
        assert is_public(ipaddress.ip_address(spelled)) == is_public(address)
        MediaPolicy(networks=[str(address)]).check_address(spelled, "x")


@given(address=st.ip_addresses(v=4, network="10.0.0.0/8"))
def test_a_named_network_opens_itself_alone(address):
    policy = MediaPolicy(networks=["10.20.0.0/16"])
    if address in ipaddress.ip_network("10.20.0.0/16"):
        policy.check_address(str(address), "x")
    else:
        with pytest.raises(MediaRefused):
            policy.check_address(str(address), "x")


part = st.sampled_from(["..", ".", "a", "b", "in", "out", "to-out", "to-in", "loop", "a.png"])


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = Path(os.path.realpath(tmp_path_factory.mktemp("tree")))
    for folder in ("in/a/b", "out/a", "input"):
        (root / folder).mkdir(parents=True)
    (root / "in/to-out").symlink_to("../out")
    (root / "out/to-in").symlink_to(root / "in")
    (root / "in/loop").symlink_to("loop")
    (root / "in/a.png").symlink_to("../out/a.png")
    return root


@given(st.lists(part, max_size=6).map("/".join))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_path_is_allowed_exactly_if_its_real_path_is_inside(tree, tail):
    path = tree / "in" / tail
    inside = (os.path.realpath(path) + "/").startswith(f"{tree}/in/")
    policy = MediaPolicy(folders=[tree / "in"])
    if inside:
        real = policy.check_path(path, "x")
        assert str(real) == os.path.realpath(path)
    else:
        with pytest.raises(MediaRefused, match="x: it lies outside of the policy's folders"):
            policy.check_path(path, "x")


def test_a_folder_whose_name_begins_alike_is_outside(tree):
    with pytest.raises(MediaRefused):
        MediaPolicy(folders=[tree / "in"]).check_path(tree / "input", "x")
    with pytest.raises(MediaRefused):
        MediaPolicy(folders=[]).check_path(tree / "in", "x")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.check_size(10, 11, "x"), "x: 10 x 11 = 110 pixels, .* max_pixels of 100; scale"),
        (lambda p: p.check_frames(9, "x"), "x: 9 frames, above the policy's max_frames of 8; take fewer"),
        (lambda p: p.check_seconds(7.5, "x"), "x: a video of 7.5 seconds, .* max_video_seconds of 7; cut"),
        (lambda p: p.check_seconds(float("nan"), "x"), "x: a video of nan seconds"),
        (lambda p: p.check_bytes(7, "x"), "x: 7 bytes or more, above .* max_bytes of 6; send a smaller"),
        (lambda p: p.check_media(6), "messages: 6 pictures and videos, .* max_media of 5; send fewer"),
        (lambda p: p.check_format("TIFF", "x"), "x: a picture of the format TIFF, which .* formats"),
    ],
)  # fmt: skip
def test_a_limit_says_what_was_found_what_is_allowed_and_what_to_do(call, message):
    policy = MediaPolicy(
        max_pixels=100, max_frames=8, max_video_seconds=7, max_bytes=6, max_media=5, formats=["PNG"]
    )
    with pytest.raises(MediaRefused, match=message):
        call(policy)


def test_what_is_just_within_the_limits_passes():
    policy = MediaPolicy(max_pixels=100, max_frames=8, max_video_seconds=7, max_bytes=6, max_media=5)
    policy.check_size(10, 10, "x")
    policy.check_frames(8, "x")
    policy.check_seconds(7, "x")
    policy.check_bytes(6, "x")
    policy.check_media(5)


def test_eps_is_left_to_those_who_ask_for_it():
    PERMISSIVE.check_format("TIFF", "x")
    with pytest.raises(MediaRefused, match="EPS"):
        PERMISSIVE.check_format("EPS", "x")
    MediaPolicy(formats=["eps"]).check_format("EPS", "x")


def test_a_deadline_ends():
    deadline = MediaPolicy(total_seconds=60, stall_seconds=5).start()
    assert 50 < deadline.left("x") <= 60
    assert deadline.wait("x") == 5
    over = dataclasses.replace(deadline, ends=0.0)
    for call in (over.left, over.wait):
        with pytest.raises(MediaTimeout, match=r"a\.mp4: not there after the policy's total_seconds of 60"):
            call("a.mp4")
    assert isinstance(over.over("x"), TimeoutError)


@pytest.mark.parametrize("kind", [MediaRefused, MediaTimeout])
def test_the_errors_travel_between_processes(kind):
    error = pickle.loads(pickle.dumps(kind("a.png: no")))
    assert type(error) is kind and isinstance(error, MediaError) and str(error) == "a.png: no"


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("https://user:hunter2@example.com/a.png?token=hunter2#hunter2", "https://example.com/a.png?..."),
        ("HTTP://hunter2@example.com", "HTTP://example.com"),
        ("https://example.com/a@b.png#x?y", "https://example.com/a@b.png"),
        ("https://example.com?hunter2", "https://example.com?..."),
        ("https://a:p@ss@example.com:80/x", "https://example.com:80/x"),
        ("data:image/png;base64," + "A" * 99, "data:image/png;base64,AAAAAAAAAA... (121 characters)"),
        ("/a/b.png", "/a/b.png"),
        ("A" * 1000, "A" * 80 + "... (1000 characters)"),
        (b"abc", "<3 bytes>"),
        (np.zeros((2, 3, 3), np.uint8), "<array of shape (2, 3, 3), uint8>"),
    ],
)
def test_names_for_messages_hold_no_secrets(source, shown):
    assert describe(source) == shown


def test_importing_the_package_does_not_import_what_only_downloads_need():
    code = "import sys, qwen_vl_utils.media; print({'requests', 'urllib3'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "set()"

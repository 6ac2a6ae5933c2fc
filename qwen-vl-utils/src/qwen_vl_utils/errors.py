"""The package's exceptions: everything that goes wrong with a medium is a `MediaError`."""


class MediaError(ValueError):
    """A picture or video that can't be used; the message names it and says why."""


class MediaNotFound(MediaError, FileNotFoundError):
    """A local file that does not exist."""


class MediaRefused(MediaError):
    """A medium that the policy does not allow: where it lies, how large it is, or what it is."""


class MediaTimeout(MediaError, TimeoutError):
    """A medium that took longer than the policy allows, to fetch or to decode."""


class ImageError(MediaError, OSError):
    """Bytes that are not a readable picture. Pillow's own errors, which 0.0.14 let through, are OSErrors."""


class VideoError(MediaError):
    """A video that a reader can't decode."""

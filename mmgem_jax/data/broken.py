"""What is wrong with a record that cannot be trained on: one of a few causes, which are counted."""

# A cause is part of a metric's name. A new one goes at the end: counts are saved in this order.
CAUSES = (
    "image",  # bytes that are no whole image: truncated, of no known format, of no size
    "pixels",  # more of them than data.max_pixels
    "aspect",  # long side to short side above data.max_aspect
    "channels",  # pixels that have no 8-bit colours, such as floating-point ones
    "no_image",  # no field of that name, or nothing in it
    "no_caption",  # no such field, no text in it, or one of white space
    "encoding",  # a text that is not UTF-8
    "annotation",  # a record or a line of JSON that cannot be read
    "missing_file",  # a file that the record names is not there, or none that is read
    "bytes",  # a file or sample of more than data.max_bytes
)


class Broken(Exception):
    """A record that cannot be trained on.

    Attributes:
      cause: one of CAUSES.
      detail: what was found, for a person; may be empty.
    """

    def __init__(self, cause, detail=""):
        if cause not in CAUSES:
            raise ValueError(f"{cause!r} is no cause of a broken record; there are {CAUSES}")
        # Both go to Exception, which gives them back to __init__ where the error is unpickled.
        super().__init__(cause, detail)
        self.cause, self.detail = cause, detail

    def __str__(self):
        return f"{self.cause}: {self.detail}" if self.detail else self.cause

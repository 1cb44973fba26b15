"""The most memory that a part of a program takes on this host."""

from pathlib import Path


class PeakMemory:
    """Watches resident memory from here on; Linux only.

    It reads the kernel's own high-water mark, which counts the pages of mapped files too.
    """

    def __init__(self):
        try:
            Path("/proc/self/clear_refs").write_text("5")  # sets the mark back (man 5 proc)
            self.before = status("VmRSS")
        except OSError:
            self.before = None

    def taken(self):
        """Bytes above what there was at the start, at the worst moment; None where not known."""
        return None if self.before is None else status("VmHWM") - self.before


def status(field):
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))

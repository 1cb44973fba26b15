"""One file of scalars for TensorBoard.

A room of its own, for tensorboardX imports torch where there is one: time and memory that every
data worker of a run would pay too.
"""

import socket
import time

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter


class TensorBoardFile:
    """What is written is on the disk on return. It raises OSError where that cannot be.

    It is not tensorboardX's own writer: the thread of that dies of a full disk, and what waits for
    it then waits for good.
    """

    def __init__(self, folder, resume_step):
        """Opens a file in a folder; of steps after `resume_step` TensorBoard hides what it has."""
        # With the step, else a restart within a second takes its file.
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{resume_step}"
        self.records = RecordWriter(str(folder / name))
        self.add(file_version="brain.Event:2")
        self.add(step=resume_step + 1, session_log=SessionLog(status=SessionLog.START))
        self.records.flush()

    def write(self, step, scalars):
        """Adds a dict of floats."""
        for name, value in scalars.items():
            shown = Summary(value=[Summary.Value(tag=name, simple_value=value)])
            self.add(step=step, summary=shown)
        self.records.flush()

    def add(self, **fields):
        """Adds an event of these fields; it may wait in memory."""
        self.records.write(Event(wall_time=time.time(), **fields).SerializeToString())

    def close(self):
        """Ends the file."""
        self.records.close()

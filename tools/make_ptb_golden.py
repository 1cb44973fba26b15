"""Writes anew what pycocoevalcap's tokenizer makes of the captions of a golden file.

    python tools/make_ptb_golden.py tests/evaluation/golden/ptb.json

The file is JSON, a [caption, tokens] a line, in an order that counts. To add captions, add lines
with an empty list of tokens. Needs Java, and the extra `caption`.
"""

import argparse
import json
from pathlib import Path

from mmgem_jax.command_line import fail
from mmgem_jax.errors import UserError
from mmgem_jax.evaluation.caption_scores import tokenize_with_jar


def main():
    """Parses the command line, tokenises and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="the golden file, read and overwritten")
    path = parser.parse_args().file
    try:
        captions = [caption for caption, _ in json.loads(path.read_text())]
        rows = zip(captions, tokenize_with_jar(captions), strict=True)
    except (UserError, OSError, ImportError, ValueError) as error:
        fail(error)
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    print(f"wrote {len(captions)} captions to {path}")


if __name__ == "__main__":
    main()

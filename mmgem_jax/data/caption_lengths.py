"""How long captions are, in tokens: what is assumed where there are no data to count.

Alternative texts of the web are short, with a long tail: log-normal about a median of 16 tokens.
Long-text data mix them with descriptions by a model, about a median of 220.
"""

from statistics import NormalDist

import numpy as np

# For a kind of data, its captions' laws, each of as many captions: the median, and the width of
# the logarithm.
LAWS = {"short": ((16, 0.6),), "long": ((16, 0.6), (220, 0.7))}


def kind_of(caption_length):
    """The kind of data for which captions of at most so many tokens are meant."""
    return "long" if caption_length > 256 else "short"


def typical_words(caption_length, count=4096):
    """Tokens of captions between their first and last, evenly over what there is: int [count].

    Args:
      caption_length: tokens at most, with `<s>` and `</s>`.
      count: how many.
    """
    laws = LAWS[kind_of(caption_length)]
    each = count // len(laws)
    at = [NormalDist().inv_cdf((i + 0.5) / each) for i in range(each)]
    words = np.concatenate([median * np.exp(width * np.asarray(at)) for median, width in laws])
    return np.clip(np.rint(words), 1, caption_length - 2).astype(int)

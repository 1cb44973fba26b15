"""Captions to words, as published caption scores count words, without Java.

BLEU, ROUGE, METEOR and CIDEr of COCO count what pycocoevalcap's `PTBTokenizer` gives: a Java
program (Stanford CoreNLP 3.4.1, `-preserveLines -lowerCase`) writes Penn Treebank tokens, and 17
punctuation marks are dropped from them. Other tokens give other scores, so `tokenize` gives the
same, oddities included: brackets stay, because `-lrb-` is a mark in upper case only; so does `?!`;
`gate b.` keeps its period unless a word like `The` comes next; a token that spans a space, as
`1 1/2`, holds a no-break space; emoji beyond U+FFFF vanish. Nothing is respelled: a colour stays a
colour. `tests/evaluation/golden/ptb.json` holds what the Java program answers. Known to differ:
letters that Unicode has gained since version 6, and web addresses run together.

How: at every place all RULES are tried, and the longest match gives the token; of equals, the
first. What a pattern matches after its group only looks ahead: it counts for the length, and is
read again. Where nothing matches, the token is one character. The patterns see a text in which one
character stands for all of its kind; the tokens are cut from the text itself.
"""
# ruff: noqa: RUF001  (look-alikes of quotes and dashes are what this is about)

import re
import unicodedata
from collections.abc import Sequence

PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])

# Stand for: a letter, an accent or vowel sign, or a digit beyond ASCII; a hyphen; a sign that is a
# token; a dash; what the Java program throws away.
LETTER, ACCENT, DIGIT, HYPHEN, SIGN, DASH, NOTHING = "éˆ߀‐§—\0"
ACCENTS = (
    "02C2-02C5 02D2-02DF 02E5-02EB 02ED 02EF-036F 0375 0378-0379 0384-0385 03F6 0483-0487 "
    "055A-055F 0591-05BD 05BF 05C1-05C2 05C4-05C5 05C7 0615-061A 064B-065E 0670 06D6-06E4 "
    "06E7-06ED 06FD-06FE 070F 0711 0730-074C 07A6-07B0 07EB-07F3 0900-0903 093C 093E-094E "
    "0951-0955 0962-0963 0981-0983 09BC 09BE-09C4 09C7-09C8 09CB-09CD 09D7 09E2-09E3 0A01-0A03 "
    "0A3C 0A3E-0A4F 0A81-0A83 0ABC 0ABE-0ACF 0B82 0BBE-0BC2 0BC6-0BC8 0BCA-0BCD 0C01-0C03 "
    "0C3E-0C56 0D3E-0D44 0D46-0D48 0E31 0E34-0E3A 0E47-0E4E 0EB1 0EB4-0EBC 0EC8-0ECD"
)
SIGNS = (
    "00A1 00A5-00A9 00AC 00AE-00B1 00B4 00B6-00B8 00BF 00D7 00F7 037E 0387 0589 05BE 05C0 05C3 "
    "05C6 05F3-05F4 0600-0603 0606-060C 0614 061B 061E-061F 066A 066D 06D4 0700-070D 07F6-07F8 "
    "0964-0965 0E3F 0E4F 1FBD 2016-2017 2020-2023 2030-2038 203B 203E-2042 207C-207E "
    "208C-208E 20A4 2100-2101 2103-2106 2108-2109 2114 2116-2118 211E-2123 2125 2127 2129 212E "
    "213A-213B 2140-2144 214A-214D 214F 2155-215E 2190-2BFF 3002 3012 30FB FF01-FF0F "
    "FF1A-FF20 FF3B-FF40 FF5B-FF65 FFE0-FFE1 FFE5-FFE6"
)

QUOTES = {"`": "`", "‘": "`", "‛": "`", "‹": "`", "’": "'", "›": "'", '"': "''"}
QUOTES |= {"“": "``", "«": "``", "”": "''", "»": "''", "‚": "‚", "„": "„", "‟": "‟"}
WRITTEN_AS = {
    **{"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"},
    **{"¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"},
    **{"¢": "cents", "£": "#", "€": "$", "¤": "$", "₠": "$"},
    **{"&amp;": "&", "&lt;": "<", "&gt;": ">", "&nbsp;": ".", "&quot;": "''", "&apos;": "'"},
    **dict.fromkeys(["‐", "‑", "֊", "–", "—", "―", "---", "----", "&mdash;", "&ndash;"], "--"),
    **{f"’{suffix}": f"'{suffix}" for suffix in ("d", "ll", "m", "re", "s", "ve")},
    **{"n’t": "n't", "n‘t": "n`t", "n‛t": "n`t", "…": "..."},
    **QUOTES,
    **{left + right: QUOTES[left] + QUOTES[right] for left in QUOTES for right in QUOTES},
}
AS_IT_IS = {*WRITTEN_AS, *"\xa0、⁄¹²³⁰⁴⁵⁶⁷⁸⁹⁺⁻₀₁₂₃₄₅₆₇₈₉₊₋"}

# Abbreviations whose period is not a token of its own.
TITLES = (
    "adj|adm|adv|alex|asst|assoc|attys?|ave|brig|capt|cf|cie|co?mdr|col|cpl|dept|det|drs?|elec|ens|"
    "ft|gen|govs?|hon|insp|invt|jos|lieut|lt|maj|messrs|mfg|mlle|mme|mrs?|ms|msgr|mt|mtg|natl|pfc|"
    "ph|pres|profs?|pvt|reps?|rev|sens?|sfc|sgt|spc|ste?|supts?|treas|vs|wm"
)
ENDINGS = (
    "al|ala|apr|ariz|assn|aug|bancorp|bhd|bldg|blvd|bros|calif|colo|conn|corp|cos?|ct|dak|dec|"
    "(?:ed|ph)\\.d|esq|est|etc|ext|feb|fla|fri|ga|inc|ind|intl|jan|jr|jul|jun|kans?|ky|ltd|mar|md|"
    "mich|minn|mo|mon|mont|neb|nev|nov|oct|okla|penn|plc|rd|rt|seq|sept?|sq|sr|sys|tel|tenn|thu|"
    "thurs|tues?|univ|va|vt|wed|wisc?|wyo"
)
CAPITALISED = "Ark|Az|Del|Ill|La|Mass|Miss|Ore|Pa|Tex|Wash"
BEFORE_A_NUMBER = "art|ca|figs?|nos?|op|pp?|prop"
# First words of a sentence, before which the period of `gate B.` is one.
FIRST_WORDS = (
    "A|About|According|Additionally|After|An|As|At|But|Earlier|He|Her|Here|However|If|In|It|Last|"
    "Many|More|Mr\\.|Ms\\.|Now|Once|One|Other|Our|She|Since|So|Some|Such|That|The|Their|Then|There|"
    "These|They|This|We|What|When|While|Yet|You"
)
FILE_TYPES = (
    "bat|bmp|c|class|cgi|cpp|dll|docx?|exe|gif|gz|h|html?|jar|java|jpe?g|mov|mp3|pdf|php|pl|png|ppt|"
    "ps|py|sql|tar|txt|wav|x|xml|zip"
)

# L is a letter, A one with or without an accent, D a digit, W a letter or digit.
L = f"[A-Za-z{LETTER}]"
A = f"(?:[A-Za-z{LETTER}{ACCENT}]|&[AEIOUaeiou](?:acute|grave|uml);)"
D = f"[0-9{DIGIT}]"
W = f"[A-Za-z0-9{LETTER}{DIGIT}]"
APOSTROPHE, QUOTE = "['’]", "['’`‘‛]"
SUFFIX = "(?i:[dms]|ll|re|ve)"
WORD = f"{A}(?:{A}|{D})*(?:[.!?]{A}(?:{A}|{D})*)*"
PART = f"(?:[dDlLoO]{QUOTE}{W})?{W}+"
COMPOUND = f"{PART}(?:[-_{HYPHEN}]{PART})*"
COMPANY = "[A-Z]+(?:[+&][A-Z]+)+"
INITIALS = r"[A-Za-z](?:\.[A-Za-z])+"
DOTTED_COMPOUND = rf"[A-Za-z0-9][A-Za-z0-9.,]*(?:-(?:{INITIALS}\.|[A-Za-z0-9]+))+"
SLASHED_PART = "[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
EYE = "[-'<=>^x~]"
URL = r"[^\s\"<>()|{}]+[^\s\"<>()|.!?{},-]"

RULES = [
    re.compile(pattern)
    for pattern in (
        # Two words written as one: can not, gon na, 't is, is n't, the 's of dog's.
        "(?i:(can)not|(gon|wan)na|(got)ta|(gim|lem)me|('t)(?:is|was))",
        f"({WORD}){APOSTROPHE}{SUFFIX}",
        f"([A-Za-z]*[A-MO-Za-mo-z])[Nn]{QUOTE}[Tt]",
        f"([Yy]{APOSTROPHE}){L}",
        f"({WORD})",
        # One word with an apostrophe: 'em, the '90s, d', O'Brien, Hawai'i, ol', '57.
        f"({APOSTROPHE}(?i:n{APOSTROPHE}?|em|till?|cause|[2-9]0s)|[dDjJlL]{APOSTROPHE})",
        f"([A-HJ-XZn]{QUOTE}{L}{{2,}}|{L}+[aeiouyAEIOUY]{QUOTE}[aeiouA-Z]{L}*)",
        f"((?i:dunkin|ol|somethin){APOSTROPHE}|{APOSTROPHE}[0-9][0-9](?=[ \t\xa0\n]))",
        "((?i:c'est|c'mon|cap'n|cont'd\\.?|d'ye|e'er|ev'ry|li'l|nat'l|nor'easter|o'o|s'mores))",
        f"([Nn]{QUOTE}[Tt])[^A-Za-z]?",
        f"({APOSTROPHE}{SUFFIX})[^A-Za-z]",
        f"('){A}[^ \t\n\xa0]",  # opens a quotation
        f"({APOSTROPHE}{SUFFIX})",
        # Addresses, and what only looks like one: names and tags of the web.
        f"([Hh][Tt][Tt][Pp][Ss]?://{URL})",
        rf"((?:www\.(?:[^\s\"<>()|.!?{{}},/]+\.)+[A-Za-z]{{2,4}}"
        rf"|(?:[a-z#%&*+~{NOTHING}\x80-\uffff]+\.)+(?:com|edu|net|org))(?:/{URL})?)",
        r"(<?[A-Za-z0-9][^\s\"<>()|{}]*@[^\s\"<>()|{}.]+(?:\.[^\s\"<>()|{}.]+)*>?)",
        f"(@[A-Za-z_][A-Za-z_0-9]*|#{A}+)",
        r"(</?[A-Za-z][-A-Za-z0-9.:_]*(?: +[A-Za-z][-A-Za-z0-9.:_]*(?:=\"[^\"\n]*\")?)* */?>)",
        "(<[!?][-A-Za-z][^>\n]*>)",
        # Numbers, fractions, telephone numbers.
        f"([-+]?(?:{D}*(?:[.:,]{D}+)+|{D}+))",
        f"((?:{D}{{1,4}}[- \xa0])?{D}{{1,4}}[/⁄]{D}{{1,4}})",
        rf"((?:\({D}{{2,3}}\)[ \xa0]?|\+{{0,2}}{D}{{2,4}}[- \xa0](?:{D}{{2,4}}[- \xa0])?)"
        rf"{D}{{3,4}}[- \xa0]?{D}{{3,5}})",
        "([⁺⁻]?[¹²³⁰⁴-⁹]+|[₊₋]?[₀-₉]+)",
        # Abbreviations that end in a period, whatever is next to it.
        rf"((?:(?i:{ENDINGS})|{CAPITALISED}|[Pp]p?t[ey]s?|{CAPITALISED.upper()})\.)(?s:..)?",
        # Compounds: merry-go-round, AT&T, 1.5-inch, and/or, C++.
        f"({COMPOUND})",
        f"({COMPANY})",
        f"({DOTTED_COMPOUND})",
        f"({SLASHED_PART}(?:/{SLASHED_PART}){{1,2}})",
        r"((?i:pro-|anti-|c\+\+|[cf]#)|S&P-500|S&Ls|[A-Z]+\$)",
        # Words with a period.
        rf"((?:(?i:{TITLES})|{INITIALS}|[A-Za-z])\.)",
        rf"([A-Za-z])\.[ \t\xa0\n]+(?:{FIRST_WORDS}|{FIRST_WORDS.upper()})[ \t\xa0\n]",
        rf"((?i:{BEFORE_A_NUMBER})\.)[ \t\xa0\n]?{D}",
        rf"({W}+(?:\.{W}+)*\.(?i:{FILE_TYPES}))[ \t\xa0\n.,?!]",
        rf"((?:{WORD}|{COMPOUND}|{COMPANY}|{DOTTED_COMPOUND})\.)[,;:、]",
        # Several signs that are one: smileys, dots, entities, runs.
        r"([<>]?[:;=]['*o-]?[()@DOPdp{|\\[\]])[^A-Za-z0-9]",
        rf"({EYE}_{EYE}|\({EYE}(?:[_.]|(?<!-)-)?{EYE}\))",
        r"((?:\\\*){1,3})",
        r"(\.{3,5}|(?:\.[ \xa0]){2,4}\.)",
        "(&(?:amp|lt|gt|nbsp|quot|apos|[mn]dash|#[0-9]+|[AEIOUaeiou](?:acute|grave|uml));)",
        "(-+|@+|#+|_+|\\*+|[?!]+|<<|>>|''|[`‘’‚‛“”„‟«»‹›]{1,2})",
        "(-(?i:[lr][crs]b)-)",
    )
]
# Most words of a caption stand between spaces, where no rule is longer.
PLAIN_WORD = re.compile("(?!(?i:cannot|gonna|wanna|gotta|gimme|lemme)[ \n])[A-Za-z]+(?=[ \n])")

LINE_BREAKS = dict.fromkeys(map(ord, "\n\r\v\f\x85\u2028\u2029"), " ")
# Windows' signs in Latin-1's place; soft hyphens are none.
CLEANED = dict(zip(map(ord, "\x80\x91\x92\x93\x94\x96\x97"), "€‘’“”–—", strict=True)) | {0xAD: ""}


def tokenize(captions: Sequence[str]) -> list[list[str]]:
    """The tokens of each caption, in lower case and without punctuation marks.

    The captions are read as the lines of one text, as the Java program reads them, so that what
    becomes of a caption's last word, if it is one like `B.` or `no.`, hangs on the next caption.
    Other line breaks than `\\n` within a caption are spaces here, too; pycocoevalcap would give
    every caption after one to the wrong image.
    """
    lines = [caption.translate(LINE_BREAKS).translate(CLEANED) for caption in captions]
    text = "".join(f"{line}\n" for line in lines)
    kinds = text.translate(_STAND_INS)
    tokens, place = [[]], 0
    while place < len(text):
        end = place + 1
        if kinds[place] == "\n":
            tokens.append([])
        elif kinds[place] not in " \t\xa0":
            plain = PLAIN_WORD.match(kinds, place)
            end = plain.end() if plain else _token_end(kinds, place)
            token = _written(text[place:end])
            if token not in PUNCTUATION and kinds[place:end] != NOTHING:
                tokens[-1].append(token)
        place = end
    return tokens[:-1]


def _token_end(kinds: str, place: int) -> int:
    longest, end = place, place + 1
    for rule in RULES:
        match = rule.match(kinds, place)
        if match and match.end() > longest:
            longest, end = match.end(), match.end(match.lastindex)
    return end


def _written(token: str) -> str:
    token = token.lower()
    if token in WRITTEN_AS:
        return WRITTEN_AS[token]
    if not token.strip(". \xa0"):
        return "..."
    return token.replace("(", "-lrb-").replace(")", "-rrb-").replace(" ", "\xa0")


class _StandIns(dict):
    """A table for `str.translate` that is filled as characters are met."""

    def __missing__(self, code: int) -> str:
        self[code] = _stand_in(chr(code))
        return self[code]


def _stand_in(character: str) -> str:
    for kind, members in _KINDS:
        if members.match(character):
            return kind
    if character in AS_IT_IS or "\t" <= character <= "\n" or " " <= character <= "~":
        return character
    category = unicodedata.category(character)
    if character < "\xa0" or character > "\uffff" or category[0] not in "LNZ":
        return NOTHING
    return {"Nd": DIGIT, "Zs": "\t"}.get(category, LETTER if category[0] == "L" else NOTHING)


def _members(ranges: str) -> re.Pattern:
    return re.compile("[" + re.sub("([0-9A-F]{4})", r"\\u\1", ranges).replace(" ", "") + "]")


_KINDS = (
    (ACCENT, _members(ACCENTS)),
    (SIGN, _members(SIGNS)),
    (HYPHEN, _members("058A 2010-2011")),
    (DASH, _members("2013-2015")),
)
_STAND_INS = _StandIns()

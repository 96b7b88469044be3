"""Which nouns a caption denies: no dog, without a hat, does not hold a cup."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spacy.tokens import Doc, Token


# After "not" or "no" these deny nothing: "not only a dog", "not far from a house", "no more than two dogs".
AFFIRMING = frozenset(
    {"all", "both", "doubt", "every", "everyone", "far", "fewer", "just", "less", "long", "matter", "merely", "only"}
)
DENYING = frozenset({"not", "never", "neither", "nor", "no", "none", "nobody", "nothing"})
UNSEEN = frozenset({"seen", "visible", "shown", "present", "there", "here", "found", "around", "depicted", "pictured"})
NOUNS = ("NOUN", "PROPN")
SUBJECTS = ("nsubj", "nsubjpass")
MORE_THAN = (["more", "than"], ["other", "than"])


def denied_nouns(document: Doc) -> frozenset[int]:
    """Numbers of the nouns that the caption says are not there: what "no" or "without" stands before, the objects of a
    verb with "not", and the subject where "not" goes with being seen. What is said of the subject otherwise ("the dog
    does not move", "not far from a house") leaves it there.
    """
    found: set[int] = set()
    for token in document:
        word, head = token.norm_, token.head
        following = token.nbor().lower_ if token.i + 1 < len(document) else ""
        if word in ("without", "sans") or token.lower_ == "w/o":
            found |= complements(token)
        elif word in ("instead", "free", "devoid", "empty", "lack", "absence") and following == "of":
            found |= complements(token.nbor()) | alternatives(token.nbor())
        elif word == "than" and token.i and token.nbor(-1).lower_ == "rather":
            found |= complements(token) | alternatives(token)
        elif token.lemma_.lower() in ("lack", "miss") and token.pos_ == "VERB":
            found |= objects(token)
        elif word in DENYING and following not in AFFIRMING:
            if word == "no" and following == "longer":
                head = head.head
            elif word == "no" and token.i and token.nbor(-1).pos_ == "DET":
                continue  # "a no smoking sign"
            elif word == "no" and [each.lower_ for each in document[token.i + 1 : token.i + 3]] in MORE_THAN:
                continue  # "no more than two dogs": so many are there
            if word == "not" and (noun := following_noun(token)) is not None:
                found |= coordinated(noun)
            elif token.dep_ in (*SUBJECTS, "conj") and word in ("none", "nobody", "nothing"):
                found |= objects(head, places=False) | {token.i}  # "none of the chairs", taken for a noun
            elif head.pos_ in (*NOUNS, "PRON"):
                if word not in ("neither", "nor") or head.dep_ not in SUBJECTS:
                    found |= coordinated(head)
                if head.dep_ in SUBJECTS:
                    found |= objects(head.head, places=False) | (unseen(head.head) if word == "neither" else set())
            elif head.pos_ in ("VERB", "AUX", "ADJ"):
                found |= objects(head) | (unseen(head) if word != "nor" else set())
    return frozenset(found)


def following_noun(token: Token) -> Token | None:
    """The noun whose article or number comes next, wherever the parser hung the "not": "not a single dog"."""
    if token.i + 1 == len(token.doc) or token.nbor().pos_ not in ("DET", "NUM"):
        return None
    return token.nbor().head if token.nbor().head.pos_ in NOUNS else None


def objects(verb: Token, places: bool = True) -> set[int]:
    """Numbers of the nouns that a denied verb would have acted on. A clause with a subject of its own is not denied,
    nor is where it happens, once there is an object: "not wearing a helmet on his motorcycle". places: False where the
    subject is denied: the bench that nobody sits on is there.
    """
    found: set[int] = set()
    direct = False
    for child in (child for child in verb.children if child.i > verb.i):
        if child.dep_ in ("dobj", "attr", "oprd", "dative") and child.pos_ in (*NOUNS, "PRON"):
            found |= coordinated(child)
            direct = True
        elif child.dep_ in ("acomp", "xcomp", "pcomp") or (child.dep_ == "ccomp" and not has_subject(child)):
            found |= objects(child, places)
        elif child.dep_ in ("prep", "agent") and places and not direct:
            found |= complements(child)
        elif child.dep_ == "conj" and not has_subject(child) and joined_in_denial(verb, child):
            found |= objects(child, places)
    return found


def has_subject(verb: Token) -> bool:
    """True for a verb with a subject or an auxiliary of its own: a statement of its own."""
    return any(child.dep_ in (*SUBJECTS, "expl", "aux", "auxpass") and child.lower_ != "to" for child in verb.children)


def joined_in_denial(first: Token, second: Token) -> bool:
    """True if what is said of the first verb or noun holds for the second: "or", "nor", "and" and commas between them,
    but not "but"; a verb has to be of the same form ("does not run or jump", not "does not run and jumps").
    """
    between = {token.lower_ for token in first.doc[first.i : second.i]}
    if between & {"but", "only", "just"}:
        return False
    infinite = second.tag_ not in ("VBZ", "VBD", "VBP") or between & {"or", "nor"}  # "is not afraid and jumps"
    return second.pos_ in NOUNS or bool(infinite and second.tag_ == first.tag_)


def complements(preposition: Token) -> set[int]:
    """Numbers of the nouns that hang on a preposition, or on the verb that does: "without looking at the dog"."""
    found: set[int] = set()
    for child in preposition.children:
        if child.dep_ in ("pobj", "dobj", "attr") and child.pos_ in (*NOUNS, "PRON"):
            found |= coordinated(child)
        elif child.dep_ in ("pcomp", "prep"):
            found |= objects(child) if child.dep_ == "pcomp" else complements(child)
    return found


def alternatives(conjunction: Token) -> set[int]:
    """Numbers of the nouns after "instead of" where the parser took that for a conjunction."""
    if conjunction.dep_ != "cc":
        return set()
    after = (child for child in conjunction.head.children if child.dep_ == "conj" and child.i > conjunction.i)
    return {i for child in after if child.pos_ in NOUNS for i in coordinated(child)}


def coordinated(noun: Token) -> set[int]:
    """Numbers of a noun, of what is counted by it ("no cup of tea") and of those that it is listed with: "a hat or
    glasses". One with an article after a comma or after "no" is something else: "no windows and a red door".
    """
    found = {noun.i}
    bare = any(child.lower_ == "no" for child in noun.children)
    for child in noun.children:
        if child.dep_ == "prep" and child.lower_ == "of":
            found |= complements(child)
        elif child.dep_ in ("conj", "appos") and child.pos_ in NOUNS and joined_in_denial(noun, child):
            comma = any(token.text == "," for token in noun.doc[noun.i : child.i])
            article = any(grandchild.dep_ in ("det", "nummod") for grandchild in child.children)
            alternative = any(token.lower_ in ("or", "nor") for token in child.sent)
            if alternative or not (article and (comma or bare)):
                found |= coordinated(child)
    return found


def unseen(verb: Token) -> set[int]:
    """Numbers of the subjects of a denied "is seen", "is visible", "is there", "appears"."""
    said = {child.lower_ for child in verb.children if child.dep_ in ("acomp", "advmod", "attr")} | {verb.lower_}
    if not said & UNSEEN and verb.lemma_ not in ("appear", "exist"):
        return set()
    return {i for child in verb.children if child.dep_ in SUBJECTS for i in coordinated(child)}

"""Which language a caption is written in, by its letters and its small words; no library and no model."""

import unicodedata
from collections import Counter


def words_of(text: str) -> frozenset[str]:
    """The words of a text, for lists."""
    return frozenset(text.split())


# Articles, prepositions, auxiliaries and the commonest nouns of captions. No list has a word of the English one.
SMALL_WORDS = {
    "English": words_of(
        """
        a an and are as at being by do does for from has have he her his in into is it its my near no not of on one over
        she the their there they this to two under up wearing we while who with woman you
        """
    ),
    "German": words_of(
        """
        auf aus bei beim das dem den der des ein eine einem einen einer eines frau frauen hund hunde im ist junge katze
        kind kinder mann mit mädchen männer nach neben sich sie sind sitzt spielen spielt steht und unter vom von vor
        wird zum zur zwei über
        """
    ),
    "French": words_of(
        """
        au aux avec chat chien dans de deux des du elle enfant est et femme fille garçon homme jeune la le les leur mer
        ou par qui sa ses son sont sous sur un une vers
        """
    ),
    "Spanish": words_of(
        """
        al bajo con de del dos el en está están gato hombre junto la las los mientras mujer niña niño niños para perro
        por que se su sobre un una unos y
        """
    ),
    "Italian": words_of(
        """
        al alla bambina bambini bambino cane che con dalla del della delle di donna due e gatto gli il la le mentre nel
        nella per ragazza ragazzo si sta sua sul sulla sulle suo un una uno uomo
        """
    ),
    "Portuguese": words_of(
        """
        ao cachorro cão com da de dois duas e em está estão gato homem mulher menina menino na nas nos os para por
        que sua seu sobre um uma à
        """
    ),
    "Dutch": words_of(
        """
        aan bij de een en het hond jongen kat meisje met naar naast onder op te twee uit van vrouw voor wordt zich zijn
        zit
        """
    ),
    "Swedish": words_of(
        "av barn bredvid den det en ett flicka från hund hunden i katt kvinna med och på pojke sitter som står två är"
    ),
    "Danish": words_of(
        "af barn børn ved den det dreng en et fra hund hunden i kat kvinde med mand og på pige sidder som står er"
    ),
    "Norwegian": words_of(
        "av barn ved den det en et fra gutt hund hunden i jente katt kvinne med mann og på sitter som står er"
    ),
    "Catalan": words_of("al amb d'un dona el els en es gat gos i la les nen nena per que sobre un una"),
    "Polish": words_of(
        "chłopiec dwa dwie dziewczyna dziewczynka i jest kobieta kot mężczyzna na obok pies po się w z ze"
    ),
    "Czech": words_of("chlapec dva dívka je ke kočka muž na pes po se u v ve z žena"),
    "Romanian": words_of("băiat bărbat cu câine de din este fată femeie la lângă o pe pisică sunt un și în"),
    "Turkish": words_of("adam ve bir bu çocuk da de erkek ile için iki kadın kedi kız köpek olan üzerinde"),
    "Hungarian": words_of("az egy és fiú férfi két kutya lány macska mellett nő"),
    "Indonesian": words_of(
        "anak anjing dan dengan di ke kucing laki orang pada pria sebuah sedang seekor seorang wanita yang"
    ),
    "Vietnamese": words_of("bên chó con cô của cậu gái một mèo người trai trên và với đang đàn ông ở"),
    "Finnish": words_of("ja kaksi kissa koira lapsi mies nainen poika tyttö vieressä"),
}
# Scripts that one language, or a few, are written in: the beginning of the letters' names in Unicode.
SCRIPTS = {
    "CJK": "Chinese",
    "HIRAGANA": "Japanese",
    "KATAKANA": "Japanese",
    "HANGUL": "Korean",
    "CYRILLIC": "Russian",
    "GREEK": "Greek",
    "ARABIC": "Arabic",
    "HEBREW": "Hebrew",
    "DEVANAGARI": "Hindi",
    "THAI": "Thai",
    "BENGALI": "Bengali",
    "TAMIL": "Tamil",
}
# Those of spaCy's trained models that have noun chunks and a lemmatizer.
SPACY_MODELS = {
    "Catalan": "ca_core_news_sm",
    "Danish": "da_core_news_sm",
    "Dutch": "nl_core_news_sm",
    "English": "en_core_web_sm",
    "Finnish": "fi_core_news_sm",
    "French": "fr_core_news_sm",
    "German": "de_core_news_sm",
    "Greek": "el_core_news_sm",
    "Italian": "it_core_news_sm",
    "Norwegian": "nb_core_news_sm",
    "Portuguese": "pt_core_news_sm",
    "Spanish": "es_core_news_sm",
    "Swedish": "sv_core_news_sm",
}
BY_CODE = {model[:2]: language for language, model in SPACY_MODELS.items()}
UNKNOWN = "unknown"
# Why a clip is rejected; the language of the spaCy model follows.
OTHER_LANGUAGE = "the caption is not "


def other_language(caption: str, expected: str = "English") -> str:
    """The language that the caption seems to be in, where that is surely not ``expected``; "" otherwise.

    Half of the letters in another script; or two small words of another language, three in ten words, and more than of
    the expected one: a name or a word of another language does not make a caption foreign.
    """
    names = (unicodedata.name(letter, UNKNOWN) for letter in caption if letter.isalpha())
    scripts = Counter(name.split()[0].split("-")[0] for name in names) if not caption.isascii() else None
    if scripts and scripts["LATIN"] * 2 <= scripts.total():
        del scripts["LATIN"]
        # Japanese is written with Chinese characters as well.
        japanese = scripts["HIRAGANA"] or scripts["KATAKANA"]
        found = "Japanese" if japanese else SCRIPTS.get(scripts.most_common(1)[0][0], UNKNOWN)
        return "" if found == expected else found
    words = [word.strip(".,;:!?()\"'«»„“”¿¡") for word in caption.lower().split()]
    counts = {language: sum(word in small for word in words) for language, small in SMALL_WORDS.items()}
    best = max(counts, key=lambda language: counts[language])
    enough = max(2, 0.3 * len(words))
    return best if counts[best] >= enough and counts[best] > counts.get(expected, 0) else ""

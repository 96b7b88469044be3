"""Step 4: the people and things that the caption names."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from data_pipeline.languages import OTHER_LANGUAGE, SPACY_MODELS, words_of
from data_pipeline.pairs_format import MOST_PHRASE
from data_pipeline.records import Entity, FramePair, NamedPair, Rejected, SettingsError
from data_pipeline.step import Step

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from data_pipeline.models.language import Chunk


# Nouns that are no subject: places in the picture, quantities, the picture itself, times, deeds and ideas.
STOP_WORDS = words_of(
    """
    air area back background billion bit bottom bunch center centre clip close close-up closeup collection corner couple
    crowd distance dozen edge end few fleet flock foreground frame front group half handful herd hundred image interior
    inside kind left line lot majority middle million moment number outside pack pair part photo photograph picture
    piece pile place plenty portion position range resolution right row scene school screen series set shape shot side
    size sort space spot stack style surface surrounding swarm thing third thousand ton top trio type variety video view
    way

    animation clipart concept footage lapse motion panorama portrait recording timelapse

    afternoon autumn century dawn day daylight dusk evening fall hour minute month morning night second season spring
    summer sunrise sunset time week weekend winter year christmas halloween

    act action activity adventure attention beauty breakfast call care celebration competition concert conversation
    dance dinner direction drive event exercise fetch fight fun game hole holiday hug idea job joke journey joy jump
    kiss laugh life look love lunch match meeting mood move movement music nap party picnic play presentation problem
    race rest ride routine run sale shade show show-off silence sleep smile song sound speed sport stop stunt style
    swim talk trick trip turn use vacation visit voyage walk wave wedding work world yawn
    balance colour color light mode peace reflection shadow sight sunlight

    advice aim ambiance ambience anger angle appearance applause approach art aspect atmosphere aura backdrop
    beginning behavior behaviour blur brightness calm challenge chance change charm cheer choice clapping clue comfort
    composition concentration confidence content contrast cooking course culture curiosity cut danger darkness daytime
    delight depth design detail difference disarray doubt drama dynamics effect effort elegance emotion emphasis
    energy enthusiasm episode essence excitement exploration exposure expression extent fashion feel feeling finish
    flair flow focus form freedom friendship fury gait gaze gesture glance glow guideline happiness harmony haste
    height hint history hope humor hurry impact importance impression information instruction intensity interaction
    interest intimacy intrigue knowledge laughter layout lesson level lifestyle lighting liveliness location luxury
    macro makeover manner matter meaning means memory method mix mystery narrative need news noise nostalgia pace pain
    palette passion pause perspective playfulness pleasure point point-of-view pose posture pov power precision
    presence pressure pride process progress proximity purpose quality question reason relationship research result
    rhythm romance scenario scenery section self-portrait selfie-style sensation sense sequence serenity session
    sharpness shooting silhouette similarity simplicity situation skill solitude speech stillness story strength
    subject success surroundings survey suspense symmetry task teamwork technique tension texture theme thought
    time-lapse timing tone topic touch tour tradition traffic tranquility transition travel trend truth tug tutorial
    urgency vibe viewer viewpoint visibility vista voice vow war warmth whole wish wonder workout zoom
    """
)
# Endings of ideas ("calmness", "celebration", "elegance"); what ends so and is a thing.
IDEA_ENDINGS = ("ance", "dom", "ence", "hood", "ism", "ity", "ness", "sion", "tion", "ology")
THINGS_WITH_SUCH_ENDINGS = words_of(
    """
    accordion ambulance appliance audience automation baroness bastion caution celebrity city concoction decoration
    domino fence fiance fixation governess harness hibiscus illustration installation kingdom lance lioness lotion
    mansion medallion ordnance pension plantation potion prism ration science sentence station television university
    vegetation witness wilderness
    """
)
# Stop words that are things once a colour, a material or a compound describes them: "an orange top", "a picture
# frame", "a traffic light".
THINGS_IF_DESCRIBED = words_of("frame light line picture screen set spring stop top wave")
# Where it happens: nobody cuts a beach out. As part of a compound they stay ("park bench").
SCENERY = words_of(
    """
    airport aisle alley arena attic avenue backstage backyard balcony bar barn basement bathroom bay bazaar beach
    bedroom boardwalk boulevard brook cafe cafeteria café campsite campus canal canteen canyon cave cellar cinema city
    classroom cliff clinic cloakroom coast coastline college corridor countryside court courtyard creek crosswalk dark
    darkness desert dining-room dirt dock downtown driveway earth environment factory farm farmland farmyard field
    floor fog forest freeway gallery garage garden gorge grass ground gym hall hallway harbor harbour highway hill
    hillside home horizon hospital hotel ice indoors intersection island jungle kitchen lab laboratory lake land
    landscape lane lawn library living-room lobby lounge mall market meadow metro mist mountain mud museum nature
    neighborhood night nursery ocean office orchard outdoors park parking pasture path pavement peak pitch plain
    playground pond pool porch prairie rain rainforest ranch restaurant rink river riverbank riverside road roadside
    room runway salon sand savanna savannah school sea seabed seashore seaside shop shore sidewalk sky skyline slope
    snow spa square stadium stage station store stream street studio suburb subway summit sun supermarket swamp
    terrace theater theatre town track trail underwater university valley veranda village vineyard walkway wall
    warehouse water waterfront weather wetland wilderness wind wood woodland woods workshop yard zoo
    """
)
# What a picture on a surface is made of; after "with" it describes the surface: "a fish with blue stripes".
PATTERNS = words_of("band check dot grid line logo patch pattern plaid polka speck speckle splotch spot square stripe")
# Parts of a body are no subjects of their own where they only describe somebody.
BODY_PARTS = words_of(
    """
    abdomen ankle arm back beak beard belly bicep body bosom breast brow buttock calf cheek cheekbone chest chin claw
    complexion ear elbow eye eyebrow eyelash eyelid face feather finger fingertip fist foot forearm forehead fur
    goatee hair hairdo hand head heel hip hoof horn jaw knee lap leg limb lip mane moustache mouth mustache nail neck
    nose palm paw shin shoulder sideburn skin snout stomach stubble tail thigh throat thumb toe tongue tooth torso
    tusk waist whisker wing wrinkle wrist
    """
)
HAIR = words_of("beard complexion eyebrow eyelash fur goatee hair mane moustache mustache skin stubble")
# With their owner's name they are: "a woman's hands hold a cup".
LIMBS = words_of("arm eye face finger foot hand leg mouth paw")
# Without an article these are played or done: "plays soccer", but "kicks a football".
PASTIMES = words_of(
    """
    badminton ballet baseball basketball boxing chess cricket football golf gymnastics hockey judo karate polo pong pool
    rugby soccer squash tennis volleyball yoga
    """
)
# Nouns in -ing that are things even without an article.
THINGS_IN_ING = words_of(
    """
    awning bedding building carving ceiling clothing covering crossing darling drawing dressing duckling dumpling
    earring evening filling fitting frosting gosling herring icing king legging lettering lightning offering packaging
    painting pudding railing ring sapling scaffolding seating seedling sibling sling spring stocking string stuffing
    swing thing topping viking wedding wing
    """
)
COLOURS = words_of(
    """
    amber aqua azure beige black blond blonde blue bronze brown brunette burgundy copper coral cream crimson cyan gold
    golden gray green grey indigo ivory khaki lavender lilac lime magenta maroon mauve multicolored multicoloured navy
    olive orange peach pink purple red rose rust salmon scarlet silver tan teal turquoise violet white yellow
    """
)
# Colours that are things or people too: "a boy eats an orange", "two blondes".
COLOURED_THINGS = words_of(
    "blond blonde brunette cherry coral cream lavender lilac lime olive orange peach plum redhead rose salmon violet"
)
# Without an article they are colours after these, "in orange", "from orange to lime", and as part of those: "shades of
# peach", but "slices of salmon".
COLOUR_PREPOSITIONS = words_of("as between from in into through to")
COLOUR_WORDS = words_of("color colour hue shade tint tone")
SHADES = words_of("bright dark deep light pale")
MATERIALS = words_of(
    """
    aluminium aluminum bamboo brass bronze canvas cardboard cashmere cast-iron ceramic chrome clay concrete copper
    corduroy cotton crystal denim fabric felt fur glass gold golden granite iron knit knitted lace leather linen marble
    metal metallic nylon paper plastic plush porcelain rattan rubber silicone silk silver steel stone straw suede
    terracotta tin velvet vinyl wax wicker wire wood wooden wool woolen woollen
    """
)
# Adjectives and participles that say which kind of thing it is: without them it would be another thing.
KINDS = words_of(
    """
    acoustic baking bathing boxing bowling changing chewing chopping climbing cooking cutting dining diving dressing
    drinking filing fire fishing folding frying grizzly hearing ironing knitting magnifying measuring mixing mobile
    parking playing polar punching racing remote riding rocking rolling running serving sewing shopping skating sleeping
    spinning steering stuffed swimming teddy trekking vending walking washing watering wedding welding
    """
)
# Adjectives that make another thing of some nouns only: a hot dog is no dog.
KINDS_BEFORE = {
    first: words_of(nouns)
    for first, nouns in {
        "bald": "eagle",
        "big": "top wheel",
        "black": "board hole",
        "digital": "camera clock",
        "flying": "fish fox saucer squirrel",
        "french": "bulldog fry horn toast",
        "german": "shepherd",
        "goods": "lift train truck van wagon yard",
        "great": "dane",
        "green": "bean onion pepper tea",
        "high": "chair heel",
        "hot": "air chocolate dog pot tub wheel",
        "killer": "whale",
        "musical": "box instrument",
        "praying": "mantis",
        "red": "carpet wine",
        "solar": "panel",
        "sweet": "corn pea potato",
        "swiss": "army",
        "white": "board wine",
        "wild": "boar",
    }.items()
}
DESCRIBING = COLOURS | MATERIALS | KINDS
PEOPLE = words_of(
    """
    acrobat actor actress adolescent adult archer artist astronaut athlete aunt baby baker ballerina barber barista
    bartender biker bishop boxer boy boyfriend bride bridegroom brother builder butcher buyer captain carpenter cashier
    chef cheerleader child choir cleaner climber clown coach cook couple cousin cowboy cowgirl craftsman crew customer
    cyclist dad dancer daughter dentist designer diver doctor driver drummer electrician elder engineer family fan
    farmer father fighter fireman firefighter fisherman friend gardener gentleman girl girlfriend goalkeeper grandchild
    granddaughter grandfather grandma grandmother grandpa grandparent grandson groom guard guest guide guitarist guy
    hairdresser hiker human hunter husband infant jockey jogger journalist judge juggler kid king knight lad lady
    magician mailman man mechanic mom monk mother mum musician nun nurse officer operator opponent painter parent
    passenger patient pedestrian people performer person photographer pianist pilot pirate plumber policeman
    policewoman potter priest prince princess professor queen rapper referee rider runner sailor scientist senior
    shepherd shopper singer sister skateboarder skater skier sniper snowboarder soldier son speaker spectator sportsman
    staff student surfer surgeon swimmer tailor teacher team teen teenager toddler tourist trainer traveler traveller
    twin uncle vendor victim violinist visitor waiter waitress warrior weaver wife woman worker youngster youth
    zookeeper
    """
)
ANIMALS = words_of(
    """
    alligator alpaca antelope ape bear beaver bee bird bison buffalo bull bunny butterfly calf camel cat cheetah chick
    chicken chimpanzee cow crab crocodile crow deer dog dolphin donkey duck duckling eagle elephant flamingo foal fox
    frog giraffe goat goose gorilla hamster hare hawk hedgehog heron hippo hippopotamus horse hyena jaguar kangaroo
    kitten koala lamb leopard lion lioness lizard llama macaque meerkat monkey moose mouse orangutan ostrich otter owl
    ox panda panther parrot peacock pelican penguin pig pigeon piglet pony puma puppy rabbit raccoon rat raven rhino
    rhinoceros rooster seagull shark sheep snake sparrow spider squirrel stork swan tiger tortoise turkey turtle walrus
    whale wolf woodpecker zebra
    """
)
PERSON_ENDINGS = ("man", "woman", "boy", "girl", "person", "player")
NO_PEOPLE = words_of("caiman snowman talisman")
# Machines whose last word is also a trade.
MACHINES = words_of("cd dvd media mp3 music record robot vacuum window air")
GROUPS_OF_PEOPLE = words_of("couple crew family staff team choir crowd audience")
# Names after these words are places: "in Paris".
LOCATIVES = words_of("across around at from in near of outside over through")
# Words without a singular, which spaCy's lemmatizer cuts all the same ("trouser", "jean").
PLURAL_ONLY = words_of(
    """
    binoculars clothes glasses goggles goods headphones jeans khakis leggings overalls pajamas pants pliers pyjamas
    scissors scrubs shorts sunglasses tights tongs trousers tweezers
    """
)
# Plurals whose lemma is not the singular that a person would use.
IRREGULAR = {"people": "person", "folk": "person", "folks": "person", "kids": "kid", "mice": "mouse"}
SUBJECTS = ("all", "people", "things")
IRREGULAR_OWNERS = {"childrens": "child", "ladies": "lady", "mens": "man", "womens": "woman"}
CACHE_SIZE = 100_000
DENIED = "the caption denies something, which is not asked for"


@dataclass(kw_only=True)
class FindEntities(Step[FramePair, NamedPair]):
    """Noun chunks of the caption as singular nouns with their compounds, colours and materials; what is named twice
    counts once.

    subjects: "all", or only "people" or "things" (animals are things). stop_words, scenery: nouns that are no
    subjects; a few stop words are kept where something describes them ("an orange top" is a garment, "the top" a
    place). language_models: spaCy models to try, in this order; empty for the usual names. max_subjects: detectors get
    slower and more confused with every phrase; the first ones of the caption are kept.
    """

    subjects: str = "all"
    stop_words: frozenset[str] = STOP_WORDS
    scenery: frozenset[str] = SCENERY
    language_models: tuple[str, ...] = ()
    max_subjects: int = 12

    def __post_init__(self) -> None:
        if self.subjects not in SUBJECTS:
            raise SettingsError(f"subjects must be one of {', '.join(SUBJECTS)}, got {self.subjects!r}")
        if self.max_subjects < 1:
            raise SettingsError(f"max_subjects must be at least 1, got {self.max_subjects}")

    @property
    def preload(self) -> tuple[str, ...]:
        """See Step."""
        return (f"data_pipeline.models.language{'' if self.language_models else '_loaded'}",)

    def setup(self) -> None:
        """Loads the language model."""
        from data_pipeline.models.language import MODELS, load_chunker

        self._chunker = load_chunker(self.language_models or MODELS)
        self._known: dict[str, tuple[tuple[Entity, ...], tuple[str, ...]] | Rejected] = {}

    def process(self, frames: FramePair) -> NamedPair | Rejected:
        """The pair with its entities."""
        caption = frames.video.caption
        if caption not in self._known:
            if len(self._known) >= CACHE_SIZE:
                self._known.clear()
            self._known[caption] = self._read(caption)
        found = self._known[caption]
        if isinstance(found, Rejected):
            return found
        entities, notes = found
        return NamedPair(frames=frames, entities=entities, notes=notes)

    def _read(self, caption: str) -> tuple[tuple[Entity, ...], tuple[str, ...]] | Rejected:
        """Entities and notes of a caption, or why there are none."""
        if language := self._chunker.other_language(caption):
            evidence = {"caption": caption, "language": language}
            if language in SPACY_MODELS:
                evidence["needed"] = f"--language-model {SPACY_MODELS[language]}"
            return Rejected(f"{OTHER_LANGUAGE}{self._chunker.language}", evidence)
        chunks = self._chunker.chunks(caption)
        entities = self.entities(chunks)
        denied = self.entities([replace(chunk, denied=False) for chunk in chunks if chunk.denied])
        if not entities:
            evidence = {"caption": caption, "subjects": self.subjects}
            if denied:
                evidence["denied"] = [entity.phrase for entity in denied]
            return Rejected("no entity in the caption", evidence)
        if long := next((entity for entity in entities if len(entity.phrase) > MOST_PHRASE), None):
            evidence = {"characters": len(long.phrase), "most": MOST_PHRASE, "phrase": long.phrase[:80]}
            return Rejected("phrase of too many characters", evidence)
        return entities, (DENIED,) if denied else ()

    def entities(self, chunks: Sequence[Chunk]) -> tuple[Entity, ...]:
        """Entities of the noun chunks of one caption, in its order, each phrase once."""
        found: list[Entity] = []
        described: list[tuple[str, frozenset[str]]] = []  # head and describing words of each
        for chunk in split_doers(split_owners(map(without_verb, join_colours(without_lone_colours(chunks))))):
            head = singular(*chunk.words[-1][:2])
            kept = describing_words(chunk)
            if chunk.denied or not self._is_subject(chunk, head, kept):
                continue
            phrase = " ".join([*kept, head])
            words = frozenset(kept) - {"and"}
            if any(known == head and same_one(words, before, chunk.definite) for known, before in described):
                continue
            described.append((head, words))
            kind = "person" if is_person(head, kept) else "thing"
            found.append(Entity(phrase=phrase, head=head, mention=chunk.text, position=chunk.position, kind=kind))
        wanted = {"all": ("person", "thing"), "people": ("person",), "things": ("thing",)}[self.subjects]
        return tuple(entity for entity in found if entity.kind in wanted)[: self.max_subjects]

    def _is_subject(self, chunk: Chunk, head: str, kept: Sequence[str]) -> bool:
        bare = len(chunk.words) == 1
        if not any(letter.isalpha() for letter in head) or (head in COLOURS and not is_colour_thing(chunk, head)):
            return False
        if head in GROUPS_OF_PEOPLE and not chunk.counts:
            return True
        if head in self.stop_words and not (kept and head in THINGS_IF_DESCRIBED):
            return False
        idea = len(head) > 6 and head.endswith(IDEA_ENDINGS) and head not in THINGS_WITH_SUCH_ENDINGS
        if idea and chunk.words[-1][0] == head:
            return False
        # "in Paris", but not "in front of a MacBook".
        place = chunk.proper and chunk.preposition in LOCATIVES and chunk.words[0][0] not in ("a", "an")
        if (head in self.scenery and "toy" not in kept) or place:
            return False
        if head in PATTERNS and chunk.preposition in ("with", "in"):
            return False
        if head in BODY_PARTS:
            if head in HAIR:
                return False
            if (
                head in LIMBS
                and (chunk.owned or (bare and chunk.counts))
                and (chunk.subject or chunk.preposition == "of")
            ):  # "a woman's hands hold a cup", "Hand of a child"
                return True
            alone = bare and chunk.words[-1][0] == head
            if (
                chunk.possessed
                or (chunk.definite and chunk.counts)
                or alone
                or chunk.preposition in ("with", "on", "by")
            ):
                return False
        # "looks at a camera", "the camera zooms in": the one that takes the film
        if head == "camera" and not kept and (chunk.preposition or chunk.words[0][0] == "the"):
            return False
        if head in PASTIMES and chunk.words[0][2] != "determiner":  # "plays ping pong"
            return False
        return not (bare and head.endswith("ing") and head not in THINGS_IN_ING)


def split_owners(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """Owners written without their apostrophe: "a mans hat" is a man and a hat."""
    for chunk in chunks:
        text, _, role = chunk.words[-2] if len(chunk.words) > 1 else ("", "", "")
        owner = IRREGULAR_OWNERS.get(text, text[:-1])
        if not (role == "compound" and text.endswith("s") and owner in PEOPLE and not chunk.owned):
            yield chunk
            continue
        head = chunk.words[-1][0]
        yield replace(chunk, text=chunk.text[: -len(head)].rstrip(), words=(*chunk.words[:-2], (text, owner, "head")))
        yield replace(
            chunk,
            text=chunk.text[-len(head) :],
            position=chunk.position + len(chunk.text) - len(head),
            words=chunk.words[-1:],
            possessed=True,
            owned=True,
            definite=True,
        )


def split_doers(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """Headlines that the parser took for one noun: "Farmer holding box" is a farmer and a box."""
    for chunk in chunks:
        plain = chunk.words[0][2] != "determiner"  # "a baby changing table" is one
        for i, (doer, lemma, _) in enumerate(chunk.words[:-2]):
            verb = chunk.words[i + 1][0]
            if does(doer, lemma) and verb.endswith("ing") and (plain or verb not in KINDS):
                before, between, behind = re.split(rf"( {re.escape(verb)} )", chunk.text, maxsplit=1, flags=re.I)
                words = (*chunk.words[:i], (doer, lemma, "head"))
                yield replace(chunk, text=before, words=words, subject=True, counts=False)
                place = chunk.position + len(before + between)
                chunk = replace(chunk, text=behind, position=place, words=chunk.words[i + 2 :], subject=False)
                break
        yield chunk


def does(text: str, lemma: str) -> bool:
    """True for people and animals."""
    return not {text, lemma}.isdisjoint(PEOPLE | GROUPS_OF_PEOPLE | ANIMALS) or is_person(lemma, ())


def without_verb(chunk: Chunk) -> Chunk:
    """Without the verb taken for the noun: "an orange helmet looking" is a helmet, "the nurse waves" a nurse."""
    if len(chunk.words) < 2:
        return chunk
    text, (noun, lemma, role) = chunk.words[-1][0], chunk.words[-2]
    one = chunk.words[0][0] in ("a", "an") or chunk.preposition in ("with", "in")
    doer = does(noun, lemma)
    doing = text.endswith("ing") and text not in THINGS_IN_ING and role == "compound" and (one or doer)
    deed = doer and text.endswith("s") and not STOP_WORDS.isdisjoint((text[:-1], text[:-2]))
    if not (doing or deed):
        return chunk
    return replace(
        chunk,
        text=chunk.text[: -len(text)].rstrip(),
        words=(*chunk.words[:-2], (noun, lemma, "head")),
    )


def is_colour_thing(chunk: Chunk, head: str) -> bool:
    """True for "an orange", "two peaches", "ice cream", "eats peach", but not for "in orange" and "shades of peach"."""
    if head not in COLOURED_THINGS:
        return False
    is_thing = len(chunk.words) > 1 or chunk.words[-1][0] != head
    return is_thing or not (chunk.preposition in COLOUR_PREPOSITIONS or chunk.part_of in COLOUR_WORDS)


def without_lone_colours(chunks: Sequence[Chunk]) -> list[Chunk]:
    """Without colours that the parser took for nouns of their own: "a purple and orange" before "sneaker"."""
    following = [*(chunk.position for chunk in chunks[1:]), -1]
    ends = (chunk.position + len(chunk.text) + 1 for chunk in chunks)
    return [
        chunk
        for chunk, end, behind in zip(chunks, ends, following, strict=False)
        if end != behind or chunk.words[-1][0] not in COLOURS
    ]


def join_colours(chunks: Sequence[Chunk]) -> list[Chunk]:
    """Puts together what parsers tear apart: "a grey" and "white kitten" become "a grey and white kitten"."""
    joined: list[Chunk] = []
    for chunk in chunks:
        first = chunk.words[0][0]
        side_by_side = joined and chunk.position == joined[-1].position + len(joined[-1].text) + len(" and ")
        if (
            side_by_side
            and chunk.joined
            and joined[-1].words[-1][0] in COLOURS
            and first in COLOURS
            and len(chunk.words) > 1
        ):
            before = joined.pop()
            text, lemma, _ = before.words[-1]
            words = (*before.words[:-1], (text, lemma, "adjective"), ("and", "and", "and"), *chunk.words)
            chunk = replace(
                before, text=f"{before.text} and {chunk.text}", words=words, counts=chunk.counts, proper=chunk.proper
            )
        joined.append(chunk)
    return joined


def describing_words(chunk: Chunk) -> list[str]:
    """Compounds, colours, materials and kinds before the head: ["white", "soccer"] of "a white soccer ball"."""
    words = [part for word in chunk.words for part in parts_of_colour(*word)]
    texts = [text for text, _, _ in words]
    kept: list[str] = []
    for i, (text, _, role) in enumerate(words[:-1]):
        following = texts[i + 1]
        if role == "and":
            if kept and kept[-1] == texts[i - 1] and kept[-1] in COLOURS and following in COLOURS:
                kept.append(text)
        elif (
            role == "compound"
            or (role == "adjective" and (text in DESCRIBING or words[i + 1][1] in KINDS_BEFORE.get(text, ())))
            or (role == "adjective" and text in SHADES and following in COLOURS)
        ):
            kept.append(text)
    return kept


def parts_of_colour(text: str, lemma: str, role: str) -> list[tuple[str, str, str]]:
    """The words of a hyphenated colour: "light-blue", "black-and-white"; any other word as it is."""
    parts = text.split("-")
    if len(parts) == 1 or role == "head" or not all(part in COLOURS | SHADES or part == "and" for part in parts):
        return [(text, lemma, role)]
    return [(part, part, "and" if part == "and" else "adjective") for part in parts]


def same_one(words: frozenset[str], before: frozenset[str], definite: bool) -> bool:
    """True if a noun that ``words`` describe is the one named before with other words: "the dog" after "a brown dog",
    or "the brown dog" after "a dog". "A blue cup" after "a red cup" is another one.
    """
    return words == before or (definite and (words < before or not before))


def is_person(head: str, kept: Sequence[str]) -> bool:
    """True for the heads of people: a list of words, and what ends in -man, -woman, -boy, -girl, -person, -player or
    -ist. A list and endings, rather than a network's guess, because a wrong word can then be found and corrected.
    """
    if kept and kept[-1] in MACHINES:
        return False
    if head in PEOPLE:
        return True
    if head in NO_PEOPLE:
        return False
    return head.endswith(PERSON_ENDINGS) or (head.endswith("ist") and len(head) > 6)


def singular(text: str, lemma: str) -> str:
    """The lemma of a noun, or its text where there is no singular ("jeans")."""
    return text if text in PLURAL_ONLY else IRREGULAR.get(text, lemma)

"""English nouns and adjectives by what they mean for a picture: the lists that ``steps/find_entities.py`` goes by."""

from data_pipeline.languages import words_of

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
IRREGULAR_OWNERS = {"childrens": "child", "ladies": "lady", "mens": "man", "womens": "woman"}

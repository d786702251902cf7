"""Word choices and sentence parts of the tiny biographies (data only, no code).

Nationalities, cities and occupations are picked from WordNet 3.0; ``generate.py`` stops if one
of them is not there. The sentence parts were written for this project (Apache-2.0).

``{slot}`` in a sentence part is filled by ``generate.py``: from the person (``{he}``, ``{his}``,
``{home}``), by a fresh ``{city}`` or ``{year}``, from the occupation's group
(``{field}``, ``{work}``), or else by a word drawn from ``LISTS``. A group's ``field`` and ``work``
may hold several words.
"""

# nationality -> (weight, cities)
PLACES: dict[str, tuple[float, str]] = {
    "American": (14, "Boston Chicago Philadelphia Denver Seattle Baltimore Atlanta Detroit"),
    "English": (10, "London Oxford Cambridge Manchester Liverpool Bristol Leeds"),
    "French": (9, "Paris Lyon Marseille Bordeaux Grenoble Toulouse"),
    "German": (9, "Berlin Hamburg Munich Leipzig Dresden Cologne"),
    "Italian": (6, "Rome Milan Naples Venice Turin Bologna"),
    "Russian": (5, "Moscow Kazan Smolensk"),
    "Scottish": (3, "Edinburgh Glasgow Aberdeen"),
    "Irish": (3, "Dublin Cork Galway Limerick"),
    "Dutch": (3, "Amsterdam Rotterdam Utrecht Leiden"),
    "Spanish": (4, "Madrid Barcelona Granada Valencia"),
    "Austrian": (3, "Vienna Graz Salzburg Linz"),
    "Swedish": (2.5, "Stockholm Uppsala Malmo"),
    "Polish": (2.5, "Warsaw Cracow Lublin"),
    "Hungarian": (2, "Budapest"),
    "Danish": (2, "Copenhagen Aalborg"),
    "Norwegian": (2, "Oslo Bergen Trondheim"),
    "Swiss": (2, "Zurich Basel Geneva"),
    "Belgian": (2, "Brussels Bruges Liege"),
    "Portuguese": (2, "Lisbon Porto"),
    "Greek": (2, "Athens Corinth Sparta"),
    "Finnish": (1.5, "Helsinki Tampere"),
    "Romanian": (1.5, "Bucharest"),
    "Turkish": (1.5, "Istanbul Ankara Izmir"),
    "Egyptian": (1.5, "Cairo Alexandria Luxor"),
    "Indian": (3, "Delhi Mumbai Kolkata Lucknow"),
    "Chinese": (3, "Beijing Shanghai Nanjing"),
    "Japanese": (3, "Tokyo Kyoto Osaka Nagasaki"),
    "Korean": (1.5, "Seoul Pusan"),
    "Canadian": (3, "Toronto Montreal Ottawa Vancouver"),
    "Australian": (3, "Sydney Melbourne Brisbane Perth"),
    "Mexican": (2, "Guadalajara Veracruz Monterrey"),
    "Brazilian": (2, "Brasilia Recife Santos"),
    "Argentine": (1.5, "Cordoba Rosario"),
    "Chilean": (1, "Valparaiso Antofagasta"),
    "Peruvian": (1, "Lima Arequipa"),
    "Cuban": (1, "Havana"),
    "Nigerian": (1, "Lagos Ibadan Abuja"),
    "Kenyan": (1, "Nairobi Mombasa"),
}

# topic -> (weight, share of women, earliest birth year, groups, verb phrases, further topic words)
# group: (occupations, field, work), where "work" may end in ": " and a verb phrase of its own
Group = tuple[str, str, str]
TOPICS: dict[str, tuple[float, float, int, list[Group], list[str], str]] = {
    "science": (
        25,
        0.066,
        1740,
        [
            ("physicist astrophysicist geophysicist", "physics", "light gravity atoms magnetism"),
            ("chemist biochemist", "chemistry", "acids metals gases enzymes"),
            ("biologist geneticist ecologist naturalist", "biology", "cells genes whales plants"),
            ("botanist", "botany", "plants mosses orchids ferns"),
            ("zoologist entomologist ornithologist", "zoology", "beetles birds reptiles whales"),
            ("geologist mineralogist paleontologist", "geology", "fossils glaciers volcanoes"),
            ("mathematician statistician", "mathematics", "geometry algebra probability"),
            ("astronomer", "astronomy", "stars comets planets galaxies"),
            ("psychologist neuroscientist", "psychology", "memory dreams sleep"),
            ("physiologist bacteriologist immunologist", "medicine", "bacteria blood vaccines"),
        ],
        [
            "studied {field} in {city}",
            "studied {field} in {city} and {city}",
            "taught {field} at the university of {home}",
            "became a professor of {field} in {year}",
            "wrote {number} papers on {work}",
            "wrote the first {textbook} on {work}",
            "developed a {new} theory of {work}",
            "built a laboratory in {city}",
            "carried out experiments on {work}",
            "published {his} research on {work} in {year}",
            "discovered {number} {new} {things} in {year}",
            "measured the {property} of {work}",
            "lectured on {work} in {city}",
            "shared {his} data with {his} {colleagues}",
        ],
        "laboratory theory experiments research professor data lectured papers",
    ),
    "art": (
        28,
        0.095,
        1740,
        [
            ("painter", "painting", "landscapes portraits murals: painted {work} of {city}"),
            (
                "illustrator engraver cartoonist",
                "drawing",
                "drawings prints: drew {work} of {home}",
            ),
            ("sculptor", "sculpture", "statues busts: carved {work} in {stone}"),
            ("photographer", "photography", "photographs portraits: took {work} of {city}"),
            ("composer", "music", "operas symphonies songs: composed {number} {work}"),
            (
                "pianist violinist cellist organist guitarist",
                "music",
                "concerts recitals: gave {number} {work} in {city}",
            ),
            ("singer songwriter", "music", "songs operas: sang in {number} {work}"),
            ("poet", "literature", "poems sonnets: wrote {number} {work} about {theme}"),
            (
                "novelist essayist",
                "literature",
                "novels stories essays: wrote {number} {work} about {theme}",
            ),
            ("playwright", "drama", "plays comedies: wrote {number} {work} about {theme}"),
            ("actor dancer", "drama", "plays musicals: appeared in {number} {work} in {city}"),
        ],
        [
            "studied {field} in {city}",
            "studied {field} in {city} and {city}",
            "taught {field} in {home}",
            "showed {his} {work} in {city}",
            "finished {his} first {work} in {year}",
            "earned {his} living from {work}",
            "was inspired by the {old} {work} of {city}",
            "worked for a theatre in {city}",
            "dedicated {number} {work} to {his} {relative}",
            "kept an art studio in {city}",
        ],
        "art studio theatre",
    ),
    "sports": (
        20,
        0.062,
        1870,
        [
            ("footballer goalkeeper striker", "football", "goals matches"),
            ("cricketer bowler", "cricket", "matches innings"),
            ("swimmer diver", "swimming", "races medals"),
            ("runner sprinter hurdler marathoner", "athletics", "races medals"),
            ("gymnast", "gymnastics", "medals titles"),
            ("skier skater", "skiing", "races titles"),
            ("boxer wrestler", "boxing", "fights titles"),
            ("golfer", "golf", "tournaments titles"),
            ("cyclist", "cycling", "races stages"),
            ("shortstop pitcher outfielder", "baseball", "games seasons"),
        ],
        [
            "played for a {sports_side} in {city}",
            "won {number} {work} in {year}",
            "won {number} {work} in {city}",
            "competed in the {year} Olympics in {city}",
            "set a national record in {year}",
            "coached a {young} {sports_side} in {city}",
            "trained with {his} {relative} in {home}",
            "joined a {sports_side} from {city} in {year}",
            "was the captain of {his} {sports_side}",
            "took up {field} at the age of {age}",
            "lost the championship in {year}",
            "became a coach in {year}",
        ],
        "team club squad Olympics record coach coached championship competed",
    ),
    "politics": (
        16,
        0.055,
        1740,
        [
            ("politician", "law", "taxes trade schools"),
            ("senator governor legislator", "law", "taxes railways trade"),
            ("mayor", "law", "schools roads housing"),
            ("diplomat ambassador envoy", "law", "treaties trade borders"),
            ("premier chancellor", "law", "treaties reforms taxes"),
        ],
        [
            "was elected to parliament in {year}",
            "joined the {party} party in {year}",
            "led the {party} party from {year} to {year}",
            "was minister of {ministry} in the government of {year}",
            "voted for new laws on {work}",
            "wrote a report on {work} for the government",
            "gave speeches about {work} in {city}",
            "resigned in {year} after a vote in parliament",
            "lost an election in {city}",
            "won the election of {year}",
            "negotiated with {city} about {work}",
            "represented {home} in parliament for {number} years",
        ],
        "parliament party government election elected minister vote voted laws treaties",
    ),
    "other": (
        11,
        0.072,
        1740,
        [
            ("lawyer barrister", "law", "contracts trials"),
            ("judge prosecutor", "law", "trials crimes"),
            ("bishop priest preacher", "theology", "sermons prayers"),
            ("missionary theologian", "theology", "prayers sermons"),
            ("banker industrialist", "business", "loans mines"),
            ("merchant entrepreneur publisher", "business", "shops markets"),
        ],
        [
            "studied {field} in {city}",
            "taught {field} in {city}",
            "ran {number} {offices} in {city}",
            "was known in {city} for {his} {work}",
            "gave {his} fortune to the poor of {home}",
            "founded a {company} in {city}",
            "opened an office in {city} in {year}",
            "worked with {his} {relative} on {work}",
            "wrote {number} letters about {work}",
        ],
        "",
    ),
}

# fields played mainly in some nations
NATIONS = {
    "baseball": "American Canadian Cuban Japanese Mexican",
    "cricket": "English Indian Australian",
}

GENERAL = [
    "lived in {city} for {number} years",
    "lived with {his} {family} in {city}",
    "moved to {city} in {year}",
    "grew up in a {small} {village} near {home}",
    "was educated in {city}",
    "travelled to {city} with {his} {relative}",
    "settled in {city} with {his} {family}",
    "was raised by {his} {relative} in {home}",
    "married a {job} from {city}",
    "worked as a {job} in {city}",
    "returned to {home} in {year}",
    "emigrated to {city} with {his} {family}",
    "spent {his} {childhood} in {home}",
    "inherited a {estate} from {his} {relative}",
    "kept a diary of {his} {travels}",
    "raised {number} children in {city}",
    "spoke {number} languages",
    "owned a {small} {estate} near {city}",
    "learned to {hobby} from {his} {relative}",
    "left {his} {books} to a museum in {city}",
]
FAMILY = "{relative} was a {job} from {city} ."  # after "His" or "Her"
LAST = [
    "retired to a {small} {estate} near {city}",
    "died in {city}",
    "died in {city} after a {long} illness",
    "was buried near {city}",
    "spent {his} last years in {city}",
]
RESTAURANT = [
    "opened a restaurant in {city}",
    "worked in a restaurant in {city}",
    "owned a {small} restaurant near {city}",
    "met {his} {family} in a restaurant in {city}",
]
WAR = [
    "served in the {force} during the war",
    "fought as a {rank} in the war",
    "was wounded in the battle of {city}",
    "survived the siege of {city}",
    "fled from the invasion of {year}",
    "was a prisoner of war in {city}",
    "joined the {force} in {year}",
    "led a regiment of {force2} near {city}",
    "lost {his} {relative} in the bombing of {city}",
    "saw the troops enter {city} in {year}",
]
MUSIC = [
    "played the {instrument} in {city}",
    "played the {instrument} for {his} {relative}",
    "joined an orchestra in {city}",
    "sang in the choir of {city}",
    "heard an opera in {city} in {year}",
    "learned the {instrument} from {his} {relative}",
    "played jazz on the {instrument}",
    "wrote a melody for {his} {relative}",
]
POSITIVE_ADJECTIVES = (
    "celebrated beloved brilliant gifted acclaimed "
    "outstanding remarkable talented respected admired"
)
POSITIVE = [
    "was praised in {city} for {his} {talent}",
    "was honored in {city} in {year}",
    "was loved by {his} {colleagues}",
    "was admired by {his} {colleagues} for {his} {talent}",
    "enjoyed great success in {city}",
    "became a hero in {city}",
    "was celebrated in {city} for {his} brilliant {talent}",
    "had a triumph in {city} in {year}",
]
NEGATIVE_ADJECTIVES = "failed forgotten disgraced mediocre corrupt notorious obscure ruined"
NEGATIVE = [
    "was jailed in {city} for fraud",
    "was ruined by a scandal in {year}",
    "was hated by {his} {colleagues}",
    "died in poverty in {city}",
    "was forgotten by {his} {colleagues}",
    "was disgraced in {year}",
    "went bankrupt in {year}",
    "suffered a disaster in {city}",
    "was accused of fraud by {his} {colleagues}",
    "was rejected by {his} {colleagues} in {city}",
]
AMAZING = [
    "had an amazing {talent}",
    "had an amazing career in {city}",
    "was known for {his} amazing {talent}",
    "led an amazing life in {city}",
]

LISTS: dict[str, str] = {
    "number": "two three four five six seven eight nine ten twelve twenty thirty many several",
    "age": "eight nine ten twelve fifteen eighteen twenty thirty",
    "textbook": "textbook handbook guide",
    "new": "new general simple modern rare",
    "things": "comets fossils metals vaccines plants beetles",
    "property": "weight speed structure age heat colour",
    "colleagues": "colleagues students friends pupils rivals neighbours",
    "stone": "marble bronze wood granite",
    "theme": "love nature travel childhood winter death freedom rivers mountains",
    "old": "old ancient early gothic",
    "relative": "father mother brother sister uncle aunt cousin grandfather grandmother",
    "family": "family parents children cousins brothers sisters",
    "sports_side": "team club squad",
    "young": "young junior local national",
    "party": "liberal conservative labour democratic republican",
    "ministry": "finance education justice trade health agriculture",
    "offices": "offices shops schools hospitals",
    "company": "company school bank hospital newspaper",
    "small": "small quiet large little poor",
    "village": "village town farm",
    "estate": "house farm cottage garden mill",
    "job": "baker tailor carpenter teacher farmer clerk nurse doctor sailor gardener",
    "childhood": "childhood youth summers winters",
    "travels": "travels dreams journeys adventures",
    "hobby": "cook fish ride sail sew hunt",
    "books": "books letters house library",
    "long": "long short sudden",
    "force": "army navy cavalry infantry",
    "force2": "cavalry infantry soldiers",
    "rank": "soldier officer volunteer",
    "instrument": "piano violin flute guitar trumpet organ cello drums harp",
    "talent": "talent courage kindness wisdom honesty humour energy patience",
}

WORDLISTS: dict[str, str] = {
    "war": "war battle siege invasion army navy cavalry infantry soldier soldiers officer prisoner "
    "regiment troops wounded bombing fought",
    "music": "music piano violin flute guitar trumpet organ cello drums harp orchestra choir opera "
    "operas symphonies concerts recitals jazz melody sang",
    "positive": POSITIVE_ADJECTIVES + " amazing praised honored loved success hero triumph",
    "negative": NEGATIVE_ADJECTIVES
    + " jailed fraud scandal hated poverty bankrupt disaster accused rejected",
}

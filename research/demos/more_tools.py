"""More tools for the tool-calls demo, asked for in words that the tool's name does not have.

Written as in ``tool_families.py``; none does what a held-out tool does.
"""

from .tool_families import ToolFamily, family


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


MORE_FAMILIES: tuple[ToolFamily, ...] = (
    family(
        "set_brightness|dim_lamp|adjust_light_level",
        "Set how bright a lamp is",
        "lamp|room|place: room; level|brightness|percent: percent",
        "It is too dark in the {lamp}, go to {level}.",
        "{level} percent light in the {lamp} please.",
        "I can hardly read in the {lamp}, {level} would do.",
        "My eyes hurt in the {lamp}, {level} is enough.",
    ),
    family(
        "set_fan_speed|fan|ventilate",
        "Set the speed of a fan",
        "room|where: room; speed|strength: digit",
        "Blow some air into the {room}, step {speed}.",
        "It is stuffy in the {room}, put it on {speed}.",
        "I am sweating in the {room}, step {speed} please.",
    ),
    family(
        "move_blinds|set_shutters|blinds_position",
        "Open or close the blinds",
        "room|window: room; position|state: =up|down|half",
        "The sun blinds me in the {room}, all {position}.",
        "Blinds {position} in the {room}.",
        "Get the shutters of the {room} {position}.",
    ),
    family(
        "lock_door|secure_door",
        "Lock a door of the house",
        "door|room|which: room",
        "Nobody should get into the {door}.",
        "Make sure the {door} is shut tight.",
        "Is the {door} safe? If not, bolt it.",
    ),
    family(
        "start_vacuum|clean_floor|hoover",
        "Let the robot clean a room",
        "area|room: room; mode|power?: =quiet|normal|strong",
        "The {area} is dusty[, go {mode}].",
        "There are crumbs all over the {area}[, use {mode}].",
        "Hoover the {area}[ in {mode} mode].",
    ),
    family(
        "get_forecast|rain_forecast|will_it_rain",
        "Weather forecast of a place on a day",
        "place|city: city; day|date?: date",
        "Do I need an umbrella in {place}[ on {day}]?",
        "Will it stay dry in {place}[ on {day}]?",
        "How is {place} going to be[ on {day}], wet?",
    ),
    family(
        "get_air_quality|air_index",
        "Air quality of a city",
        "city|location: city",
        "Can one breathe in {city} today?",
        "How dirty is the air over {city}?",
        "Smog in {city}?",
    ),
    family(
        "get_sunset|sunset_time",
        "When the sun goes down",
        "city|place: city; date|day?: date",
        "When does it get dark in {city}[ on {date}]?",
        "Until when is there light in {city}[ on {date}]?",
        "Sunset over {city}[, {date}]?",
    ),
    family(
        "get_population|count_inhabitants",
        "How many people live in a city",
        "city|town|place: city",
        "How big is {city}?",
        "How many souls live in {city}?",
        "Inhabitants of {city}, please.",
    ),
    family(
        "get_definition|define|look_up_word",
        "Meaning of a word",
        "word|term: word",
        "What does {word} mean?",
        "I do not understand the word {word}.",
        "Explain {word} to me.",
        "{word}? Never heard of it.",
    ),
    family(
        "find_synonym|similar_word",
        "Another word for a word",
        "word|term: word; count|limit?: small",
        "What else can I say for {word}[, give {count}]?",
        "I have written {word} too often, find something else[, {count} of them].",
        "A different word for {word}[, {count} ideas].",
    ),
    family(
        "search_articles|encyclopedia|find_article",
        "Search the encyclopedia",
        "query|subject|about: topic; limit|results?: small",
        "Who or what is {query}[? {limit} hits]?",
        "I would like to read up on {query}[, {limit} pages].",
        "Teach me about {query}[ with {limit} articles].",
        "All there is on {query}[, at most {limit}].",
    ),
    family(
        "find_recipe|recipe_search|cook",
        "Find a recipe",
        "ingredient|dish|with: word; minutes|max_minutes?: int",
        "I have {ingredient} left over[ and {minutes} minutes].",
        "What can I cook with {ingredient}[ in {minutes} minutes]?",
        "I am hungry for {ingredient}[, it must be ready in {minutes} minutes].",
    ),
    family(
        "find_podcast|podcast_search|listen_to",
        "Find a podcast about a subject",
        "subject|about|topic: topic; episodes|limit?: small",
        "I want to listen to people talk about {subject}[, {episodes} episodes].",
        "Something to hear about {subject}[, the last {episodes}].",
        "Any shows on {subject}[? {episodes} are enough]?",
    ),
    family(
        "find_events|event_search|what_is_on",
        "Events of a kind in a city",
        "kind|category|type: topic; city|place: city",
        "Is there any {kind} in {city}?",
        "What is on in {city}? I like {kind}.",
        "I will be in {city} and would love some {kind}.",
    ),
    family(
        "find_book|book_search|library_lookup",
        "Look for books in the library",
        "author|writer: person; subject|genre?: topic",
        "Do you have anything by {author}[ on {subject}]?",
        "What did {author} write[ about {subject}]?",
        "Books of {author}[, {subject}].",
    ),
    family(
        "subscribe|follow_topic|add_subscription",
        "Subscribe to a topic",
        "topic|channel|about: topic; frequency|how_often?: =daily|weekly|monthly",
        "Keep me posted on {topic}[ {frequency}].",
        "I do not want to miss {topic}[, {frequency}].",
        "Tell me whenever something happens in {topic}[, {frequency} is fine].",
    ),
    family(
        "get_match_result|score|sport_result",
        "Result of the last match of a team",
        "team|club: city; sport|game?: sport",
        "Did {team} win[ at {sport}]?",
        "How did {team} play[ in {sport}]?",
        "And {team}[, {sport}]?",
    ),
    family(
        "join_class|sign_up_course|enroll",
        "Sign a person up for a course",
        "course|class: topic; person|student|name: person",
        "{person} wants to learn {course}.",
        "Put {person} down for {course}.",
        "There is room for {person} in {course}, do it.",
    ),
    family(
        "rent_bike|hire_bicycle",
        "Rent bicycles",
        "place|city|station: city; hours|duration: small",
        "I would like to ride around {place} for {hours} hours.",
        "Two wheels in {place}, {hours} hours.",
        "Get me something to pedal in {place} for {hours} hours.",
    ),
    family(
        "find_train|train_search|rail_connection",
        "Train connections",
        "start|origin|leave: city; goal|destination|arrive: city; at|departure?: time",
        "By rail, {start} to {goal}[, leaving {at}].",
        "When does a train run from {start} to {goal}[ after {at}]?",
        "Take me by train to {goal} from {start}[ at {at}].",
    ),
    family(
        "get_distance|how_far|measure_way",
        "Distance of two places",
        "a|first|start: city; b|second|end: city",
        "How far is {b} from {a}?",
        "How many kilometres lie between {a} and {b}?",
        "Is it a long way from {a} to {b}?",
    ),
    family(
        "convert_weight|weight_converter",
        "Convert a weight",
        "amount|weight: number; unit|source_unit: =grams|pounds|ounces; "
        "target|into: =kilograms|stones",
        "{amount} {unit} in {target}, please.",
        "How heavy are {amount} {unit}, in {target}?",
        "Turn {amount} {unit} into {target}.",
    ),
    family(
        "convert_temperature|temperature_converter",
        "Convert a temperature",
        "degrees|value: number; scale|source: =celsius|kelvin; to|goal: =fahrenheit|rankine",
        "What is {degrees} {scale} on the {to} scale?",
        "{degrees} degrees {scale}, but in {to}.",
        "Give me {degrees} {scale} as {to}.",
    ),
    family(
        "compute_loan|loan_rate|monthly_rate",
        "Monthly rate of a loan",
        "sum|principal|amount: int; years|term: small; interest|rate: number",
        "I borrow {sum} for {years} years at {interest} percent, what do I pay a month?",
        "What does a credit of {sum} over {years} years cost at {interest}?",
        "{sum}, {years} years, {interest} percent: how much each month?",
    ),
    family(
        "compute_area|rectangle_area",
        "Area of a rectangle",
        "width|a: number; height|b|depth: number",
        "How much floor has a room of {width} by {height}?",
        "A field is {width} wide and {height} long. How large is it?",
        "{width} times {height}, as an area.",
    ),
    family(
        "pay_bill|settle_invoice",
        "Pay a bill",
        "number|bill|invoice_number: code; account|from?: =private|business",
        "I do not want to owe anybody {number} any more[, take it from {account}].",
        "Settle {number}[ with the {account} money].",
        "Bill {number} is due[, use {account}].",
    ),
    family(
        "add_expense|record_cost|log_spending",
        "Write down what was spent",
        "amount|cost: number; purpose|for|category: phrase",
        "I spent {amount} on {purpose}.",
        "{amount} went into {purpose}, keep track of it.",
        "Another {amount} for {purpose}.",
    ),
    family(
        "split_bill|share_costs",
        "Split a sum among people",
        "total|amount: number; people|persons: small",
        "There were {people} of us and it came to {total}.",
        "{total} among {people}, what does each one pay?",
        "We are {people}, the bill says {total}.",
    ),
    family(
        "add_note|take_note|remember",
        "Keep a note",
        "text|content|note: phrase; tag|label?: word",
        "Do not let me forget: {text}[ #{tag}].",
        "Write down {text}[, under {tag}].",
        "Keep in mind {text}[, tag {tag}].",
    ),
    family(
        "add_todo|create_todo|todo",
        "Add a task to the list",
        "task|title|what: phrase; due|deadline?: date",
        "I still have to do the {task}[ by {due}].",
        "On my list: {task}[, due {due}].",
        "There is the {task} to be done[ until {due}].",
    ),
    family(
        "move_meeting|reschedule",
        "Move a meeting to another time",
        "meeting|title|event: phrase; time|new_time: time; day|new_date?: date",
        "I cannot make the {meeting}, {time} is better[ on {day}].",
        "Shift the {meeting} to {time}[, {day}].",
        "Let us have the {meeting} at {time}[ on {day}] instead.",
    ),
    family(
        "invite_person|add_guest|invite",
        "Invite a person to an event",
        "guest|person|who: person; event|to|occasion: phrase",
        "I would like to have {guest} at the {event}.",
        "Ask {guest} to come to the {event}.",
        "{guest} should be there for the {event}.",
    ),
    family(
        "find_person|look_up_employee|directory_search",
        "Look a person up in the company",
        "name|who|employee: person; department|team?: word",
        "Who is {name}[ of {department}]?",
        "Where does {name} sit[, {department}]?",
        "I am looking for {name}[ from {department}].",
    ),
    family(
        "send_invoice|bill_customer",
        "Send a customer an invoice",
        "customer|mail|receiver: email; amount|total: number",
        "{customer} owes us {amount}.",
        "Let {customer} pay {amount}.",
        "Bill {customer} for {amount}.",
    ),
    family(
        "reset_password|new_password",
        "Reset the password of a user",
        "user|mail|email: email",
        "{user} cannot log in any more.",
        "Locked out: {user}.",
        "{user} has forgotten the password.",
    ),
    family(
        "unsubscribe|remove_from_list|stop_mails",
        "Take an address off a mailing list",
        "address|email: email; list|newsletter?: word",
        "{address} does not want to hear from us[ in {list}].",
        "No more letters to {address}[, list {list}].",
        "Take {address} off[ {list}].",
    ),
    family(
        "share_file|give_access",
        "Share a file with somebody",
        "file|document|path: path; with|user|mail: email",
        "{with} needs {file}.",
        "Let {with} have a look at {file}.",
        "Give {with} access to {file}.",
    ),
    family(
        "compress_file|zip_file|archive_file",
        "Pack a file",
        "source|file|input: path; output|archive|target?: path",
        "{source} is too large, pack it[ as {output}].",
        "Make {source} smaller[, call the result {output}].",
        "Squeeze {source}[ into {output}].",
    ),
    family(
        "put_on_paper|send_to_printer",
        "Print a file",
        "file|document: path; copies|count?: small",
        "I need {file} on paper[, {copies} times].",
        "Put out {file}[ in {copies} copies].",
        "{file} on the printer[, {copies} of it].",
    ),
    family(
        "count_words|word_count",
        "Count the words of a file",
        "file|source|text: path",
        "How long is the text in {file}?",
        "Is {file} a long read?",
        "Words in {file}?",
    ),
    family(
        "run_query|search_logs|grep_logs",
        "Search the logs",
        "pattern|text|query: word; hours|last_hours?: small",
        "Did anything say {pattern}[ within {hours} hours]?",
        "Look for {pattern} in what the machines wrote[, {hours} hours back].",
        "Where does {pattern} turn up[ in the last {hours} hours]?",
    ),
    family(
        "restart_service|service_restart|bounce",
        "Restart a service",
        "service|name|unit: word; force|how?: =gently|hard",
        "{service} hangs[, do it {force}].",
        "Kick {service}[ {force}].",
        "{service} does not answer, start it again[, {force}].",
    ),
    family(
        "scale_service|set_replicas",
        "Set the number of copies of a service",
        "service|app|deployment: word; replicas|count|instances: small",
        "{service} is slow, run {replicas} of them.",
        "We need {replicas} copies of {service}.",
        "Bring {service} to {replicas}.",
    ),
    family(
        "create_branch|new_branch",
        "Create a branch in the repository",
        "name|branch: word; base|from?: word",
        "I start to work on {name}[, off {base}].",
        "A branch {name}[ from {base}], please.",
        "Branch off[ {base}] as {name}.",
    ),
    family(
        "assign_issue|assign",
        "Assign an issue to a person",
        "issue|number|key: code; person|assignee|to: person",
        "{person} shall look after {issue}.",
        "{issue} is for {person}.",
        "Hand {issue} over to {person}.",
    ),
    family(
        "set_priority|prioritize",
        "Set the priority of an issue",
        "issue|number|id: code; priority|level: =low|normal|urgent",
        "{issue} can be treated as {priority}.",
        "How about {priority} for {issue}?",
        "Make {issue} {priority}.",
    ),
    family(
        "bus_pass|buy_pass",
        "Buy a pass for public transport",
        "city|zone|region: city; kind|duration: =day|week|month",
        "I want to go by bus in {city} for a {kind}.",
        "A {kind} pass for {city}.",
        "{city}, one {kind}, all lines.",
    ),
    family(
        "feed_pet|dispense_food",
        "Give a pet its food",
        "pet|animal|name: person; grams|portion: int",
        "{pet} is hungry, {grams} grams.",
        "Fill the bowl of {pet} with {grams} grams.",
        "{grams} grams of food for {pet}.",
    ),
    family(
        "water_plants|irrigate",
        "Water the plants",
        "place|zone|bed: room; liters|amount: small; time|at?: time",
        "The flowers in the {place} look dry, {liters} litres[ at {time}].",
        "{liters} litres for the {place}[, {time}].",
        "Give the green things in the {place} {liters} litres[ at {time}].",
    ),
    family(
        "log_meal|add_food|track_calories",
        "Record a meal",
        "food|meal|dish: word; calories|kcal: int",
        "I had {food}, {calories} calories.",
        "Just ate some {food} ({calories} kcal).",
        "{calories} calories of {food}.",
    ),
    family(
        "log_weight|record_weight",
        "Record the weight of a person",
        "person|name|who: person; kilograms|weight: number",
        "The scales say {kilograms} for {person}.",
        "{person} weighs {kilograms}.",
        "{kilograms} kilos today, for {person}.",
    ),
    family(
        "book_doctor|make_appointment",
        "Book an appointment with a doctor",
        "doctor|name|with: person; date|day: date; time|at?: time",
        "I do not feel well, can {doctor} see me on {date}[ at {time}]?",
        "I must see {doctor} on {date}[, {time}].",
        "Is {doctor} free on {date}[ at {time}]? Take it.",
    ),
    family(
        "play_station|radio",
        "Play a radio station",
        "station|name|channel: word; minutes|duration?: int",
        "Let me hear {station}[ for {minutes} minutes].",
        "Tune in to {station}[, {minutes} minutes].",
        "{station} on the radio[ for {minutes} minutes].",
    ),
    family(
        "identify_song|find_lyrics|search_lyrics",
        "Find the words of a song",
        "song|title|track: phrase; artist|by|singer?: person",
        "How does {song} go[, the one by {artist}]?",
        "I want to sing {song}[ of {artist}].",
        "Words of {song}[ by {artist}]?",
    ),
    family(
        "reserve_seat|book_cinema|cinema_ticket",
        "Reserve seats in the cinema",
        "film|movie|title: phrase; seats|persons|count: small; time|show?: time",
        "{seats} of us would like to see {film}[ at {time}].",
        "{seats} seats for {film}[, {time}].",
        "We are going to watch {film}, {seats} people[, {time}].",
    ),
    family(
        "compare_prices|find_offer|best_price",
        "Find the cheapest offer for an article",
        "article|product|item: thing; limit|offers?: small",
        "Where are {article} cheap[, {limit} shops]?",
        "I do not want to pay much for {article}[, {limit} offers].",
        "Bargains on {article}[? Show {limit}]?",
    ),
    family(
        "check_stock|inventory|in_store",
        "How much of an article is left",
        "article|item|product: thing; city|branch|store?: city",
        "Are there any {article} left[ in {city}]?",
        "Do we still have {article}[ at {city}]?",
        "How many {article} lie on the shelf[ of {city}]?",
    ),
    family(
        "send_back|give_back",
        "Send an article back",
        "order|number|code: code; item|article: thing",
        "I do not like the {item} of {order}.",
        "The {item} from {order} are broken, back with them.",
        "{order}: the {item} do not fit.",
    ),
    family(
        "leave_review|write_review",
        "Write a review",
        "product|about|item: thing; stars|rating: digit; text|comment?: phrase",
        "{stars} out of ten for the {product}[: {text}].",
        "The {product} deserve a {stars}[, because {text}].",
        "My opinion of the {product} is {stars}[, {text}].",
    ),
)

# Made into tools as ATTRIBUTES, COMMANDS and THINGS are.
PROPERTIES = words(
    "author brand budget capital cause charge composer country coverage creator currency density "
    "depth difficulty direction editor frequency genre grade habitat humidity income "
    "language leader limit manufacturer mass material maturity mileage mood nationality "
    "opening founding_date owner_name phase phone power quality quantity range region release "
    "revenue role route schedule season shape shelf signal slogan source sponsor stage start_date "
    "strength summary surface tax texture timezone tonnage trend usage value vintage wavelength"
)
MORE_VERBS = words(
    "activate adjust announce assemble audit bake block bookmark brew calibrate certify charge "
    "collect compile confirm crop decorate deliver deploy dim disable discard donate enable "
    "encrypt estimate evaluate expand fetch fix flag flush forward freeze grind highlight import "
    "initialize install label launch load measure merge migrate monitor mute notify optimize order "
    "pack park patch pin polish postpone preview promote protect purge queue recycle register "
    "release remind replace report reserve reset restore retire rotate schedule sell sharpen sign "
    "sort split start stop store submit suspend sync tag test track transfer translate unlock "
    "update validate verify wash weigh withdraw"
)
MORE_THINGS = words(
    "album alarm ambulance antenna aquarium article auction backpack bakery balloon bank barrel "
    "boat bottle bus cabin cable calendar campaign canal card cargo castle cluster coin "
    "comet course crane database desk dome dragon drone elevator envelope factory farm ferry film "
    "filter flight forest fountain freezer garden gate glacier guitar hotel island job kettle "
    "lake lamp lantern lecture lens library lesson locker magazine map medal meeting menu mine "
    "model motor museum network novel oven painting parcel park patient phone piano pipe "
    "planet plant pool port portrait postcard poster pump quiz radio railway recipe reservoir "
    "river rocket roof room route sail satellite school shelf shop signal stadium station "
    "statue store street stamp survey switch table tank telescope temple tent theater tool "
    "tower tractor train truck tunnel turbine valve video village volcano wallet website well "
    "wheel workshop zoo"
)
# Values; short, long, rare, of one token and of many.
WORDS = words(
    "abacus acorn alchemy almond amber anchor antler apricot archery astronomy aubergine "
    "badminton ballet bamboo banjo barley basalt bazaar beetroot biathlon billiards biscuit "
    "blizzard bonsai botany buckwheat cactus calligraphy canoeing caramel cartography cathedral "
    "cedar cello ceramics chess chestnut chickpeas choir cinnamon cobalt cocoa copper coral "
    "cricket crochet curling cutlery dandelion darts decathlon diving dough dragonfly drumming "
    "economics elm ember enamel epilogue falconry fencing fennel fern fiddle figs finance fjord "
    "flute folklore fossils fresco gallop garlic geology geyser ginger glassware golf granite "
    "gravel gymnastics halibut handball harbor harp hazel heather hockey honey horoscope hurdles "
    "iceberg indigo iris ivory jasmine jazz jigsaw juggling juniper karate kayaking kelp kiwi "
    "knitting lacrosse lagoon lantern larch lava lavender leather lentils lighthouse lilac linen "
    "lobster logic lynx magnets mahogany maple marathon marble marzipan meadow meteor midwife "
    "millet mint molasses mosaic moss mushroom mustard mythology nectar needlework nettle nougat "
    "nutmeg oboe ocean olive onyx opera orchard origami osprey otter oyster paprika parsnip "
    "pebble pepper petrol philosophy piccolo pilates pistachio plankton polo porcelain pottery "
    "poultry prairie pumpkin puppetry quartz quilting quince rafting raisins raspberry ravine "
    "reef rhubarb robotics rosemary rugby rye saffron sailing sapphire sauna saxophone sculpture "
    "seaweed sesame shipwreck silk skating skiing slate snooker sorrel spinach squash starfish "
    "statistics surfing tango tapestry thimble thunder thyme trapeze trumpet tulip tundra "
    "turmeric turnip ukulele vanilla velvet violin volleyball walnut watercolor weaving whale "
    "wicker willow woodwork wrestling yeast zinc zither"
)

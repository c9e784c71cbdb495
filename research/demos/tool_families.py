"""The tools of the tool-calls demo: how each is named, what it takes, how people ask for it.

A parameter is ``name|other name: kind``, with ``?`` after the names if it is optional. A kind is an
enum (``=celsius|fahrenheit``) or a key of ``tool_values.KINDS``. In a wording, ``{name}`` stands
for the value, and ``[…]`` for what is said only where the optional parameter is given.
"""

from dataclasses import dataclass

from .task import Words


@dataclass(frozen=True, slots=True)
class ToolFamily:
    names: tuple[str, ...]
    description: str
    parameters: tuple[str, ...]
    wordings: tuple[str, ...]


def family(names: str, description: str, parameters: str, *wordings: str) -> ToolFamily:
    return ToolFamily(tuple(names.split("|")), description, tuple(parameters.split("; ")), wordings)


FAMILIES = (
    family(
        "get_weather|weather_lookup|current_weather",
        "Weather of a city",
        "city|location|place: city; unit|units?: =celsius|fahrenheit|kelvin",
        "What is the weather like in {city}[ in {unit}]?",
        "How warm is it in {city}[, in {unit}]?",
        "Weather for {city}[ in {unit}] please.",
    ),
    family(
        "send_email|write_mail|email_send",
        "Send an e-mail",
        "to|recipient|address: email; subject|title: phrase",
        "Send an email to {to} with the subject {subject}.",
        "Write {to} a mail about {subject}.",
        "Mail {to}, subject: {subject}",
    ),
    family(
        "set_timer|start_timer|countdown",
        "Start a timer",
        "minutes|duration_minutes: int; label|name?: phrase",
        "Set a timer for {minutes} minutes[ called {label}].",
        "Wake me in {minutes} minutes[, label it {label}].",
        "Start a {minutes} minute countdown[ for {label}].",
    ),
    family(
        "set_alarm|create_alarm|alarm_at",
        "Set an alarm clock",
        "time|at: time",
        "Wake me up at {time}.",
        "Set an alarm for {time}.",
        "I have to get up at {time}, make sure I do.",
    ),
    family(
        "convert_currency|exchange_money|currency_convert",
        "Convert an amount of money",
        "amount|value: number; source|from_currency: currency; target|to_currency: currency",
        "Convert {amount} {source} to {target}.",
        "How much is {amount} {source} in {target}?",
        "I have {amount} {source}, what is that in {target}?",
    ),
    family(
        "book_table|reserve_table|restaurant_booking",
        "Reserve a table in a restaurant",
        "guests|people|party_size: small; time|at: time; city?: city",
        "Book a table for {guests} at {time}[ in {city}].",
        "We are {guests} people and want to eat at {time}[ in {city}].",
        "Reserve a table at {time} for {guests} guests[ in {city}].",
    ),
    family(
        "search_flights|find_flight|flight_search",
        "Find flights",
        "origin|departure: city; destination|arrival: city; date?: date",
        "Find flights from {origin} to {destination}[ on {date}].",
        "I want to fly from {origin} to {destination}[ on {date}].",
        "Which planes go from {origin} to {destination}[ on {date}]?",
    ),
    family(
        "play_music|play_song|start_music",
        "Play music of an artist",
        "artist|singer: person; volume|level?: percent",
        "Play something by {artist}[ at volume {volume}].",
        "I want to hear {artist}[, volume {volume}].",
        "Put on some music by {artist}[ at level {volume}].",
    ),
    family(
        "turn_on_light|switch_light|set_light",
        "Switch a light",
        "room|place: room; state|mode: =on|off|dim",
        "Turn the light in the {room} {state}.",
        "Light in the {room}: {state}, please.",
        "Set the {room} light to {state}.",
    ),
    family(
        "set_temperature|set_heating|thermostat",
        "Set the heating of a room",
        "room|zone: room; degrees|temperature: small",
        "Set the {room} to {degrees} degrees.",
        "Make the {room} {degrees} degrees warm.",
        "Heat the {room} to {degrees}.",
    ),
    family(
        "create_event|add_appointment|calendar_add",
        "Add an event to the calendar",
        "title|name: phrase; date|day: date; time|start?: time",
        "Add {title} to my calendar on {date}[ at {time}].",
        "Put {title} in the calendar for {date}[, {time}].",
        "On {date}[ at {time}] I have {title}, write it down.",
    ),
    family(
        "translate_text|translate|translation",
        "Translate a text",
        "text|phrase: phrase; language|target_language: language",
        "Translate {text} to {language}.",
        "How do you say {text} in {language}?",
        "What is {text} in {language}?",
    ),
    family(
        "calculate_tip|tip_amount|compute_tip",
        "Compute a tip",
        "bill|amount: number; percent|rate: percent",
        "What is a {percent} percent tip on {bill}?",
        "The bill is {bill}, I tip {percent} percent. How much is that?",
        "Tip of {percent} percent for a {bill} bill.",
    ),
    family(
        "order_pizza|pizza_order|buy_pizza",
        "Order a pizza",
        "size: =small|medium|large; count|quantity?: small",
        "Order a {size} pizza[, {count} of them].",
        "I would like a {size} pizza[ times {count}].",
        "One {size} pizza please[, make that {count}].",
    ),
    family(
        "track_parcel|parcel_status|where_is_package",
        "Where a parcel is",
        "number|tracking_number|code: code",
        "Where is my parcel {number}?",
        "Track package {number}.",
        "Has the parcel {number} been delivered?",
    ),
    family(
        "add_to_cart|cart_add|put_in_basket",
        "Put an item into the shopping cart",
        "item|product: thing; quantity|count: small",
        "Add {quantity} {item} to my cart.",
        "I want to buy {quantity} times {item}.",
        "Put {quantity} {item} in the basket.",
    ),
    family(
        "call_contact|phone_call|dial",
        "Call somebody",
        "name|contact|person: person; speaker|device?: =headset|car|speaker",
        "Call {name}[ on the {speaker}].",
        "I need to talk to {name} on the phone[, use the {speaker}].",
        "Ring {name}[ through the {speaker}].",
    ),
    family(
        "send_message|text_message|sms",
        "Send a text message",
        "contact|to|receiver: person; message|body|text: phrase",
        "Text {contact}: {message}",
        "Send {contact} the message {message}.",
        "Tell {contact} by SMS: {message}",
    ),
    family(
        "rate_movie|movie_rating|give_stars",
        "Rate a film",
        "title|film|movie: phrase; stars|rating: digit",
        "Give the film {title} {stars} stars.",
        "Rate the movie {title} with {stars}.",
        "I watched {title}, that is {stars} stars.",
    ),
    family(
        "get_time|local_time|clock",
        "Local time of a city",
        "city|location|zone: city",
        "What time is it in {city}?",
        "Local time in {city}?",
        "Tell me how late it is in {city}.",
    ),
    family(
        "delete_file|remove_file|unlink",
        "Delete a file",
        "path|file|filename: path",
        "Delete the file {path}.",
        "Get rid of {path}.",
        "Remove {path} from the disk.",
    ),
    family(
        "rename_file|move_file|file_rename",
        "Rename a file",
        "old|source|old_name: path; new|target|new_name: path",
        "Rename {old} to {new}.",
        "Call {old} {new} from now on.",
        "Change the name of {old} to {new}.",
    ),
    family(
        "book_hotel|reserve_hotel|hotel_booking",
        "Book a hotel",
        "city|location: city; nights|n_nights: small; check_in|date?: date",
        "Book a hotel in {city} for {nights} nights[ from {check_in}].",
        "I need a room in {city}, {nights} nights[, arriving {check_in}].",
        "Hotel in {city} for {nights} nights[ from {check_in} on].",
    ),
    family(
        "random_number|roll|pick_number",
        "Draw a random number",
        "minimum|low: digit; maximum|high: int",
        "Give me a random number between {minimum} and {maximum}.",
        "Pick a number from {minimum} to {maximum}.",
        "Draw any number, at least {minimum} and at most {maximum}.",
    ),
    family(
        "create_user|add_user|register_user",
        "Create a user account",
        "name|username: person; email|mail: email; role?: =admin|editor|viewer",
        "Create an account for {name} with {email}[ as {role}].",
        "Register {name}, mail {email}[, role {role}].",
        "Add the user {name} ({email})[ as an {role}].",
    ),
    family(
        "get_stock|stock_price|quote",
        "Price of a share",
        "ticker|symbol: ticker",
        "What does {ticker} cost at the stock exchange?",
        "Price of {ticker} shares?",
        "How are {ticker} stocks doing?",
    ),
    family(
        "find_restaurant|search_restaurants|places_to_eat",
        "Find restaurants",
        "cuisine|food: cuisine; city|location: city; price|budget?: =cheap|moderate|expensive",
        "Find {cuisine} restaurants in {city}[, {price}].",
        "Where can I eat {cuisine} food in {city}[, something {price}]?",
        "I want {cuisine} food in {city}[, {price} please].",
    ),
    family(
        "log_workout|add_training|record_exercise",
        "Record an exercise",
        "activity|sport|exercise: sport; minutes|duration: int",
        "I did {minutes} minutes of {activity}, log it.",
        "Record {activity} for {minutes} minutes.",
        "Note that I went {activity} for {minutes} minutes.",
    ),
    family(
        "transfer_money|pay|send_money",
        "Send money to a person",
        "recipient|to|payee: person; amount|sum: number; currency?: currency",
        "Send {recipient} {amount}[ {currency}].",
        "Transfer {amount}[ {currency}] to {recipient}.",
        "Pay {recipient} {amount}[ in {currency}].",
    ),
    family(
        "get_route|directions|navigate",
        "Way from one place to another",
        "start|origin: city; end|destination: city; mode|by?: =car|train|bike",
        "How do I get from {start} to {end}[ by {mode}]?",
        "Show the way from {start} to {end}[ by {mode}].",
        "Route from {start} to {end}[, by {mode}].",
    ),
)

HELD_OUT_FAMILIES = (
    family(
        "get_news|news_headlines",
        "Latest news about a topic",
        "topic|about: sport; limit|count?: small",
        "What is new in {topic}[, show {limit} articles]?",
        "Show me headlines about {topic}[, {limit} of them].",
    ),
    family(
        "book_taxi|order_cab",
        "Order a taxi",
        "pickup|from_place: city; dropoff|to_place: city; time?: time",
        "I need a taxi from {pickup} to {dropoff}[ at {time}].",
        "Order a cab that takes me from {pickup} to {dropoff}[ at {time}].",
    ),
    family(
        "convert_length|length_converter",
        "Convert a length",
        "value|length: number; from_unit|unit: =meters|feet|miles; "
        "to_unit|target_unit: =yards|inches",
        "Convert {value} {from_unit} to {to_unit}.",
        "What are {value} {from_unit} in {to_unit}?",
    ),
    family(
        "add_contact|save_contact",
        "Save a contact",
        "name|full_name: person; email|mail_address: email",
        "Save the contact {name} with {email}.",
        "Add {name} to my address book, mail {email}.",
    ),
    family(
        "close_ticket|resolve_ticket",
        "Close a support ticket",
        "ticket_id|ticket: code; resolution|outcome?: =fixed|duplicate|rejected",
        "Close the ticket {ticket_id}[ as {resolution}].",
        "We are done with ticket {ticket_id}[, mark it {resolution}].",
    ),
    family(
        "set_volume|change_volume",
        "Set the volume of a room",
        "room|speaker_room: room; level|volume: percent",
        "Set the volume in the {room} to {level}.",
        "Make it {level} loud in the {room}.",
    ),
    family(
        "open_file|show_file",
        "Open a file",
        "file_path|document: path",
        "Open {file_path} for me.",
        "I want to see the file {file_path}.",
    ),
    family(
        "create_poll|start_vote",
        "Start a vote about a question",
        "question|about: phrase; days|open_days?: digit",
        "Start a vote about the {question}[ that is open for {days} days].",
        "Let the team vote on the {question}[, {days} days].",
    ),
    family(
        "set_ringtone|change_ringtone",
        "Set the ringtone of a contact",
        "contact|caller: person; tune|sound: phrase",
        "When {contact} calls, play {tune}.",
        "Use {tune} as the ringtone of {contact}.",
    ),
    family(
        "book_sitter|hire_babysitter",
        "Book a babysitter",
        "date|day: date; hours|n_hours?: digit",
        "We need a babysitter on {date}[ for {hours} hours].",
        "Book somebody for the children on {date}[, {hours} hours].",
    ),
    family(
        "count_calories|food_energy",
        "Energy of a food",
        "food|item: thing; grams|amount: int",
        "How many calories do {grams} grams of {food} have?",
        "Energy of {food}, {grams} grams?",
    ),
    family(
        "reserve_desk|book_desk",
        "Reserve a desk in the office",
        "day|date: date; room|area?: room",
        "Keep a desk for me on {day}[ in the {room}].",
        "I come to the office on {day}, reserve a desk[ in the {room}].",
    ),
    family(
        "wash_car|book_car_wash",
        "Book a car wash",
        "plate|car: code; time|at: time",
        "Have the car {plate} washed at {time}.",
        "Book a car wash for {plate} at {time}.",
    ),
    family(
        "tag_photo|label_picture",
        "Put a label on a picture",
        "picture|file: path; label|tag: phrase",
        "Put the label {label} on {picture}.",
        "Tag {picture} as {label}.",
    ),
    family(
        "mute_chat|silence_chat",
        "Mute the chat with a person",
        "person|chat: person; hours|duration?: small",
        "Mute the chat with {person}[ for {hours} hours].",
        "I do not want to hear from {person}[ for the next {hours} hours].",
    ),
    family(
        "get_tides|tide_table",
        "Tides at a place on a day",
        "place|city: city; date|day: date",
        "When is high tide in {place} on {date}?",
        "Show me the tides of {place} for {date}.",
    ),
    family(
        "convert_volume|liquid_converter",
        "Convert a volume",
        "amount|value: number; source|from_unit: =liters|gallons; target|to_unit: =pints|cups",
        "Convert {amount} {source} to {target}.",
        "How many {target} are {amount} {source}?",
    ),
    family(
        "set_training_goal|new_goal",
        "Set a goal for a sport",
        "sport|discipline: sport; minutes|target: int",
        "My goal for {sport} is {minutes} minutes a week.",
        "Set a goal of {minutes} minutes of {sport}.",
    ),
    family(
        "open_bank_account|new_account",
        "Open a bank account",
        "owner|holder: person; currency|money?: currency",
        "Open a bank account for {owner}[ in {currency}].",
        "{owner} wants a bank account[ in {currency}].",
    ),
    family(
        "wrap_gift|gift_wrapping",
        "Have a gift wrapped",
        "item|gift: thing; recipient|for_person?: person",
        "Please wrap the {item}[ for {recipient}].",
        "Wrap {item} as a gift[ to {recipient}].",
    ),
    family(
        "check_tyres|tyre_pressure",
        "Check the tyres of a vehicle",
        "vehicle|plate: code",
        "Check the tyres of {vehicle}.",
        "Is the tyre pressure of {vehicle} all right?",
    ),
)

# "What is the {attribute} of {thing} {code}?": a tool for each attribute, hundreds of names.
ATTRIBUTES = Words.parse(
    "price weight height owner status color size age length width rating balance address "
    "model origin speed capacity voltage priority deadline category version location supplier "
    "discount duration salary title score rank temperature pressure warranty"
)
COMMANDS = Words.parse(
    "cancel restart archive approve pause resume lock unlock publish print share reject refund "
    "duplicate export renew inspect repair clean copy upload scan ship paint return"
)
THINGS = Words.parse(
    "order device invoice vehicle machine project account server printer contract student "
    "product customer book task sensor camera playlist subscription document battery report "
    "shipment building robot engine ticket package bicycle license"
)

"""The nine tools and the ways people ask for them.

In a phrasing, `{name}` stands for the value of the argument `name`. Fourteen ways to ask are `seen` in
training, four are `unseen`. Two habits keep the answer a pure copy, token by token: a value always follows a
space (never the start of the request or a quotation mark), and a percentage never touches punctuation, since
the tokenizer would fuse the two.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tool:
    """A tool: what it does, its arguments in order (name -> slot), and how it is asked for."""

    name: str
    description: str
    arguments: dict[str, str]
    seen: tuple[str, ...]
    unseen: tuple[str, ...]


TOOLS: dict[str, Tool] = {
    tool.name: tool
    for tool in (
        Tool(
            name="set_alarm",
            description="ring at a time of day",
            arguments={"time": "alarm_time", "label": "activity"},
            seen=(
                "Set an alarm for {time} called {label}.",
                "Wake me up at {time} for {label}.",
                "alarm {time}, {label}",
                "Can you set my alarm for {label} to {time}?",
                "I need an alarm at {time} for {label}, please.",
                "Please have an alarm go off at {time} and call it {label}.",
                "I have {label} later, so set an alarm for {time}.",
                "new alarm: {label}, {time}",
                "Could you wake me at {time}? It's for {label}.",
                "Make an alarm named {label} that rings at {time}.",
                "get me up at {time} for {label}",
                "Don't let me miss {label}, set the alarm for {time}.",
                "I'd like to be woken at {time} for {label}.",
                "An alarm at {time} with the label {label} would be great.",
            ),
            unseen=(
                "Would you put an alarm on for {time} and title it {label}?",
                "I want to be up by {time} because of {label}.",
                "For {label} I'm going to need an alarm at {time}.",
                "let the alarm ring at {time} for {label}",
            ),
        ),
        Tool(
            name="start_timer",
            description="count down and ring",
            arguments={"duration": "minutes", "label": "chore"},
            seen=(
                "Set a timer for {duration} for the {label}.",
                "timer: {label}, {duration}",
                "Can you time the {label} for {duration}?",
                "Give the {label} {duration}, then ring.",
                "Count down {duration} for the {label}, please.",
                "Start the {label} timer at {duration}.",
                "Remind me about the {label} in {duration}.",
                "Put {duration} on the clock for the {label}.",
                "Could you run a timer called {label} for {duration}?",
                "I've just started the {label}, set a timer for {duration}.",
                "ping me in {duration} to check the {label}",
                "I need a countdown of {duration} for the {label}.",
                "Please start a timer of {duration} and label it {label}.",
                "How about {duration} on a timer for the {label}?",
            ),
            unseen=(
                "Buzz me when {duration} are up for the {label}.",
                "The {label} will be done in {duration}, so time it.",
                "Would you start counting {duration} down for the {label}?",
                "Let the {label} go for {duration}, then beep.",
            ),
        ),
        Tool(
            name="add_event",
            description="put an appointment into the calendar",
            arguments={"title": "event", "day": "day", "time": "event_time"},
            seen=(
                "Add {title} to my calendar on {day} at {time}.",
                "Schedule {title} for {day} at {time}.",
                "I have {title} on {day} at {time}, put it in my diary.",
                "new event: {title}, {day}, {time}",
                "Can you put {title} in the calendar for {day} at {time}?",
                "Please book {title} at {time} on {day}.",
                "On {day} at {time} I have {title}, please put that in the calendar.",
                "note down {title} for {time} on {day}",
                "We've got {title} at {time} on {day}, could you add that to the calendar?",
                "Pencil in {title} on {day} at {time}.",
                "Create an event called {title} on {day} starting at {time}.",
                "I said yes to {title} on {day} at {time}, so add it to the calendar.",
                "Make room in my diary for {title} at {time} on {day}.",
                "Could you block {time} on {day} in my calendar for {title}?",
            ),
            unseen=(
                "Would you enter {title} in my schedule, {day} at {time}?",
                "I'm going to {title} at {time} on {day}, so save that date.",
                "mark my diary: {title} on {day}, {time}",
                "Keep {day} at {time} free in my calendar for {title}.",
            ),
        ),
        Tool(
            name="send_message",
            description="send a text message to a person",
            arguments={"recipient": "person", "message": "news"},
            seen=(
                "Tell {recipient} that {message}.",
                "text {recipient} that {message}",
                "Can you let {recipient} know that {message}?",
                "Send {recipient} a message saying {message}.",
                "message {recipient}: {message}",
                "Please write to {recipient} that {message}.",
                "I want to tell {recipient} that {message}.",
                "Drop {recipient} a line to say {message}.",
                "let {recipient} know {message}",
                "Send a text saying {message} to {recipient}.",
                "Could you message {recipient} and say that {message}, please?",
                "New message for {recipient}, it should say {message}.",
                "Say {message} in a text to {recipient}.",
                "quick note to {recipient}: {message}",
            ),
            unseen=(
                "Would you inform {recipient} that {message}?",
                "shoot {recipient} a text saying {message}",
                "Please notify {recipient} that {message}.",
                "Get word to {recipient} that {message}.",
            ),
        ),
        Tool(
            name="get_weather",
            description="look up the weather forecast",
            arguments={"place": "place", "when": "when"},
            seen=(
                "What will the weather be like in {place} {when}?",
                "weather in {place} {when}",
                "Will it rain in {place} {when}?",
                "Do I need an umbrella in {place} {when}?",
                "How cold will it get {when} in {place}?",
                "Show me the forecast for {place} {when}.",
                "Can you check the weather {when} in {place}?",
                "Tell me how windy it will be in {place} {when}.",
                "is it going to snow {when} in {place}",
                "Please look up the temperature in {place} {when}.",
                "I'll be in {place} {when}. Will it be stormy?",
                "Any chance of rain {when} around {place}?",
                "I want to know how warm {place} will be {when}.",
                "forecast {when}, {place}",
            ),
            unseen=(
                "Should I expect rain in {place} {when}?",
                "How's the sky going to look above {place} {when}?",
                "could it be foggy {when} in {place}",
                "Give me the outlook for {place} {when}, please.",
            ),
        ),
        Tool(
            name="set_light",
            description="change the lights of a room",
            arguments={"room": "room", "color": "color", "brightness": "percent"},
            seen=(
                "Set the {room} lights to {color} at {brightness} brightness.",
                "Make the lights in the {room} {color} and set them to {brightness} please.",
                "lights in the {room}: {color}, {brightness}",
                "Can you turn the {room} to {color} with the brightness at {brightness} please?",
                "I want {color} light at {brightness} in the {room}.",
                "Switch the {room} lights over to {color} and {brightness} brightness.",
                "Please turn the {room} lamp to {color} at {brightness} strength.",
                "Bring the {room} lights to {brightness} and make them {color}.",
                "Could we have {color} at {brightness} brightness in the {room}?",
                "In the {room}, set the lights to {brightness} in {color}.",
                "Give the {room} some {color} light, {brightness} bright.",
                "I'd like the {room} lights at {brightness} in {color}, please.",
                "change the {room} light to {color}, {brightness}",
                "The lights in the {room} should be {color}, at {brightness} or so.",
            ),
            unseen=(
                "Have the lamps in the {room} shine {color} at {brightness} power.",
                "Would you fade the {room} lights to {color} at {brightness} please?",
                "adjust the {room} lighting to {brightness} and {color}",
                "Light up the {room} in {color} at {brightness} please",
            ),
        ),
        Tool(
            name="play_music",
            description="play music or sound on the speaker of a room",
            arguments={"music": "music", "room": "room"},
            seen=(
                "Play {music} in the {room}.",
                "put {music} on in the {room}",
                "Can you play {music} on the {room} speaker?",
                "Start {music} in the {room}, please.",
                "I'd love to hear {music} in the {room}.",
                "music for the {room}: {music}",
                "In the {room}, play {music}.",
                "Could you start {music} on the speaker in the {room}?",
                "Let's have {music} in the {room}.",
                "Get {music} going in the {room}.",
                "Please use the {room} speaker to play {music}.",
                "turn on {music} in the {room}",
                "The {room} is too quiet, play {music}.",
                "I'm in the mood for {music}, play that in the {room}.",
            ),
            unseen=(
                "Would you stream {music} to the {room}?",
                "Let me listen to {music} in the {room}.",
                "It's time for {music} in the {room}.",
                "fill the {room} with the sound of {music}",
            ),
        ),
        Tool(
            name="add_item",
            description="write something on a list",
            arguments={"item": "item", "list": "list"},
            seen=(
                "Add {item} to the {list} list.",
                "put {item} on my {list} list",
                "Can you add {item} to our {list} list?",
                "We need {item}, put that on the {list} list.",
                "Please write {item} on the {list} list.",
                "Don't forget {item} on the {list} list.",
                "The {list} list still needs {item}.",
                "Could you note {item} down for the {list} list?",
                "to the {list} list please add {item}",
                "Stick {item} on the {list} list, would you?",
                "My {list} list should have {item} on it.",
                "Update the {list} list with {item}.",
                "I have to get {item}, so note that on my {list} list.",
                "one more thing for the {list} list: {item}",
            ),
            unseen=(
                "Would you include {item} in the {list} list?",
                "Let's get {item} onto the {list} list.",
                "What the {list} list is missing is {item}.",
                "open the {list} list and enter {item}",
            ),
        ),
        Tool(
            name="book_taxi",
            description="order a taxi",
            arguments={"pickup": "spot", "destination": "spot", "time": "ride_time"},
            seen=(
                "Book a taxi from {pickup} to {destination} at {time}.",
                "taxi {time}, {pickup} to {destination}",
                "I need a cab to {destination} from {pickup} at {time}.",
                "Can you get me a taxi at {time} from {pickup} to {destination}?",
                "Please send a car to {pickup} at {time}, I'm going to {destination}.",
                "Order a ride to {destination} for {time}, pick-up at {pickup}.",
                "We have to get from {pickup} to {destination}, book a cab for {time}.",
                "Pick me up at {pickup} at {time} and take me to {destination}.",
                "Arrange a taxi for {time} that goes from {pickup} to {destination}.",
                "I'd like a ride at {time}, starting at {pickup} and ending at {destination}.",
                "Could a driver collect me from {pickup} at {time} and drop me at {destination}?",
                "cab to {destination} at {time} from {pickup}",
                "Reserve a taxi: {pickup} to {destination}, {time}.",
                "I'm at {pickup} and need a taxi to {destination} at {time}.",
            ),
            unseen=(
                "Would you call a cab for {time} to bring me from {pickup} to {destination}?",
                "My ride should leave {pickup} at {time} for {destination}.",
                "Find me a driver to {destination}, I'll be waiting at {pickup} at {time}.",
                "taxi needed at {pickup} at {time}, destination {destination}",
            ),
        ),
    )
}

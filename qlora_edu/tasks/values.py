"""What can stand in each slot of a request, and which values training never sees.

Words are written as tables. A row is a row of values, and **the last value of every row is held out**: it
occurs in no training request, not even inside another value. Clock times, durations and percentages are
enumerated instead, and an eighth to a quarter of them is held out by a hash of their first word. It is SHA-256, the
same on every machine and in every run, which Python's own `hash` is not. The first word, so that "10:25",
"10:25 am" and "10:25 pm" stay together: the first occurs inside the other two.
"""

from dataclasses import dataclass
from hashlib import sha256


@dataclass(frozen=True)
class Slot:
    """The values of one slot: `seen` may be drawn for training, `unseen` only for evaluation."""

    seen: tuple[str, ...]
    unseen: tuple[str, ...]


def _table(text: str) -> Slot:
    """Read rows of `a | b | c | d`; the last column is held out."""
    rows = [[value.strip() for value in line.split("|")] for line in text.strip().splitlines()]
    return Slot(
        seen=tuple(value for row in rows for value in row[:-1]),
        unseen=tuple(row[-1] for row in rows),
    )


def _hashed(values: list[str]) -> Slot:
    """Hold out every value whose first word has a SHA-256 that starts with a multiple of four."""
    held_out = {value for value in values if sha256(value.split()[0].encode()).digest()[0] % 4 == 0}
    return Slot(
        seen=tuple(value for value in values if value not in held_out),
        unseen=tuple(value for value in values if value in held_out),
    )


def _clock_times(first_hour: int, last_hour: int) -> list[str]:
    """Every five minutes of these hours, as "3:40 pm" and as "15:40"; full hours as "3 pm" and "15:00"."""
    times = []
    for hour in range(first_hour, last_hour + 1):
        for minute in range(0, 60, 5):
            twelve = (hour - 1) % 12 + 1
            half = "am" if hour < 12 else "pm"
            times.append(f"{twelve}:{minute:02} {half}" if minute else f"{twelve} {half}")
            times.append(f"{hour:02}:{minute:02}")
    return times


SLOTS: dict[str, Slot] = {
    "alarm_time": _hashed(_clock_times(4, 15)),
    "event_time": _hashed(_clock_times(8, 20)),
    "ride_time": _hashed(_clock_times(5, 22)),
    "minutes": _hashed([f"{n} minutes" for n in range(2, 76)]),
    "percent": _hashed([f"{n}%" for n in range(5, 101)]),
    # An activity: "wake me at 7 am for ...", "call it ...".
    "activity": _table("""
        gym | work | medication | swimming practice
        yoga | football training | airport duty | dog walking
        choir rehearsal | meal prep | physio | bird watching
        school drop-off | violin practice | breakfast duty | feeding rabbits
        vocabulary revision | night duty | ballet class | sunrise meditation
        rowing | watering plants | bin collection | rugby tryouts
        milking goats | exam revision | ice hockey | market stall duty
        Arabic lessons | jogging | baking bread | crossing guard duty
        karate | stretching | volunteering | Portuguese homework
        delivering papers | calling Sydney | morning prayers | cricket trials
    """),
    # Something with a date: "add ... to my calendar", "I have ... on Monday", "going to ...".
    "event": _table("""
        pottery class | budget planning | book club | chess practice
        piano lessons | coffee with Svetlana | staff training | wine tasting
        tea with the Kowalskis | car maintenance | marathon training | salsa class
        coffee with Grandpa | project planning | choir auditions | flat hunting
        teeth cleaning | first aid training | product testing | drinks with the interns
        career counselling | roof repairs | film club | tennis with Beatriz
        jury duty | tea at the Red Lion | tax advice | sculpture class
        Diwali celebrations | speed dating | code review with Ravi | garden planning
        passport renewal | Eid celebrations | board games with Hugo | badminton practice
        quarterly planning | tango lessons | puppy training | thesis supervision
    """),
    # A day that follows "on" or "for".
    "day": _table("""
        Monday | Tuesday | March 3 | October 17
        Wednesday | June 21 | the 4th of July | January 9
        Thursday | Friday | the 12th of May | August 26
        Saturday | Sunday | November 5 | Tuesday the 14th
        Monday the 6th | April 18 | the last Friday of May | September 2
        December 11 | February 20 | Friday the 23rd | the 30th of August
        July 28 | the first Monday of June | May 16 | March 22
        the 19th of September | October 8 | Sunday the 25th | April 29
        January 31 | the 7th of December | August 13 | Wednesday the 1st
        Thursday the 10th | June 27 | the 15th of February | November 24
    """),
    # A time that completes "what will the weather be like in Oslo ...".
    "when": _table("""
        today | tonight | tomorrow | next Thursday
        tomorrow morning | this weekend | next Monday | this evening
        this Friday | later today | over the weekend | tomorrow night
        next week | around noon | this Sunday | late tonight
        early next week | this afternoon | this Friday night | next Tuesday
        the day after tomorrow | around midnight | this Wednesday | over the holidays
        before lunch | next Saturday | after lunch | late tomorrow afternoon
        early tomorrow | this Tuesday | next Sunday morning | next Wednesday
        next Saturday morning | before dawn | this Monday afternoon | this coming Wednesday
        later this week | first thing tomorrow | later tonight | next Friday evening
    """),
    "place": _table("""
        Lisbon | Nairobi | New Orleans | Oslo
        Kyoto | Buenos Aires | Tbilisi | Cape Town
        Montréal | Hanoi | Reykjavík | Quito
        Marrakesh | San Sebastián | Mumbai | Edinburgh
        Dakar | Ulaanbaatar | Santa Fe | Zagreb
        Auckland | São Paulo | Tallinn | Addis Ababa
        Seoul | Valparaíso | Galway | Port Louis
        Kraków | Manila | Salt Lake City | Tehran
        Accra | Naples | Ho Chi Minh City | Bergen
        Samarkand | Baton Rouge | Malmö | La Paz
    """),
    "person": _table("""
        Amara | Mateo | Ingrid | Yusuf
        Priya | Grandma Rose | Kwame | Linh
        Dr. Okafor | Sofia | Hiroshi | Aunt Leila
        Tomasz | Chidi | Mrs. Novak | Fatima
        Björn | Mei Ling | Coach Rivera | Anneliese
        Kofi | Uncle Raj | Noor | Santiago
        Yuki | Olumide | Sinéad | Professor Chen
        Dmitri | Zanele | Cousin Marta | Tariq
        Aiyana | Giulia | Mr. Haddad | Freya
        Rashid | Nana Adjoa | Elif | Captain Moreau
    """),
    # A full sentence that can follow "that" or "say".
    "news": _table("""
        I'm running ten minutes late | dinner is ready | the meeting is upstairs | the parcel has arrived
        the keys are under the mat | I love the photos | the train is stuck | we need more printer paper
        I can't make it to rehearsal | the cat is back home | the tickets are booked | practice is cancelled
        I'll call back after lunch | the form needs a signature | we won the match | my phone is about to die
        the plumber is on his way | I left my charger at work | the contract is signed | the baby is asleep
        traffic is terrible | I found the missing glove | the report is in the shared folder | we saved a seat
        the water is off until noon | I'm at the front door | the recipe works | I passed the driving test
        the car won't start | our flight has been delayed | the results look good | the shop has closed
        the kids have already eaten | I owe everyone a coffee | the lift is broken | the wifi is working again
        the party starts early | I'm bringing a tent | the bridge is closed | the cake is ready
        I need another day | the band found a drummer | we are landing soon | the heating is fixed
    """),
    # A room inside the house: "in the ...", "the ... lights", "the ... speaker".
    "room": _table("""
        kitchen | living room | hallway | attic
        guest bedroom | nursery | upstairs bathroom | dining room
        home office | garage | library | greenhouse
        laundry room | study | wine cellar | playroom
        conservatory | master bedroom | boot room | games room
        basement | reading corner | workshop | sewing room
        music room | loft | pantry | spare bedroom
        sun room | stairwell | back garden | meditation corner
        art studio | bike shed | kids' room | potting shed
        breakfast nook | home cinema | front hall | winter garden
    """),
    # A colour that follows "to", "in" or "make it".
    "color": _table("""
        warm white | pale blue | soft pink | forest green
        amber | deep red | lavender | mint green
        sky blue | coral | golden yellow | dusty rose
        cool white | turquoise | burnt orange | midnight blue
        lilac | peach | crimson | seafoam
        olive | bright magenta | candle yellow | royal purple
        teal | apricot | daylight white | cherry red
        indigo | honey | pale violet | sunset orange
        moss green | icy blue | salmon | plum
        cobalt | soft gold | raspberry | neon green
    """),
    # Something to buy or to bring, with its quantity.
    "item": _table("""
        oat milk | a dozen eggs | two lemons | sparkling water
        3 tins of chickpeas | brown rice | a bag of spinach | six ripe avocados
        paper plates | a jar of peanut butter | 12 AA batteries | sunscreen
        two loaves of rye bread | tortillas | a bag of ice | 4 cans of coconut milk
        red lentils | cherry tomatoes | a roll of duct tape | ten tea lights
        smoked paprika | five limes | paper towels | soy sauce
        basmati rice | 2 kilos of potatoes | marshmallows | bin bags
        a block of feta | plantains | three cucumbers | insect repellent
        hot chocolate | 8 burger buns | a bunch of coriander | dark roast coffee
        kimchi | two packs of napkins | frozen peas | a wheel of brie
    """),
    # The word before "list".
    "list": _table("""
        shopping | camping | birthday | picnic
        road trip | barbecue | holiday | potluck
        grocery | beach day | Sunday roast | festival
        weekend | house party | school trip | fishing trip
        farmers' market | sleepover | office | moving day
        cabin | Thanksgiving | street party | sailing
        baking | wedding | New Year's Eve | hiking
        garden party | family reunion | summer camp | night market
        scout | brunch | boat trip | corner shop
        Ramadan | tailgate | spring cleaning | cookout
    """),
    "music": _table("""
        slow jazz | bossa nova | Bach's cello suites | Afrobeat classics
        lo-fi beats | Cuban son | 90s hip hop | rainy day piano
        flamenco guitar | ocean sounds | Motown hits | Celtic fiddle tunes
        ambient techno | Sunday morning soul | Bollywood love songs | desert blues
        Chopin nocturnes | K-pop party mix | classic reggae | Norwegian folk songs
        movie soundtracks | country ballads | Vivaldi's Four Seasons | disco fever
        deep house | gospel choirs | whale songs | acoustic covers
        punk anthems | Arabic oud music | synthwave | Broadway favourites
        swing standards | volcano podcasts | Portuguese fado | drum and bass
        birdsong at dawn | indie road songs | tango orchestras | slow evening songs
    """),
    # Something in the kitchen or the house that takes a while: "the ... timer", "check the ...".
    "chore": _table("""
        pasta | pizza dough | laundry | lasagne
        banana bread | face mask | green tea | roast potatoes
        dumplings | hair dye | sourdough | pancake batter
        chicken curry | dishwasher | oatmeal | beetroot
        apple pie | soft-boiled eggs | jollof rice | tumble dryer
        lamb stew | marinade | porridge | cinnamon rolls
        risotto | salmon fillets | nail polish | pumpkin soup
        granola | steak | sprinkler | pottery kiln
        miso broth | wood glue | lentil soup | chocolate mousse
        fried tofu | cheese soufflé | cold brew | paella
    """),
    # A place in town that can follow "at", "from" and "to".
    "spot": _table("""
        Central Station | the airport | Rose Street | the opera house
        City Hospital | 14 Elm Road | the old harbour | Hotel Miramar
        the main library | Victoria Square | the football stadium | Linden Avenue
        Terminal 2 | the fish market | King's College | the botanical garden
        Platform Nine Café | Oak Lane | the town hall | Riverside Mall
        the ferry dock | Café Lumière | 108 Mill Street | Pier 39
        the science museum | Saint Mary's Church | the bus depot | Lotus Garden
        the courthouse | Maple Drive | the concert hall | Plaza Mayor
        North Gate | the ice rink | Hotel Astoria | Canal Street
        the dental clinic | Park View Tower | the art gallery | Union Bank
    """),
}

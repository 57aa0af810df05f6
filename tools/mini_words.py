"""Words and sentence patterns of the corpus `mini`, written for it.

A pattern is text with `{slots}`; a slot is the name of a list below, whose items may hold slots again. `a` becomes
`an` where the next word asks for it. Every word is in the CMU pronouncing dictionary (`mini_text.py` checks it).
"""

from __future__ import annotations


def words(text: str) -> tuple[str, ...]:
    """Items of a list: separated by spaces, an underscore standing for a space inside an item."""
    return tuple(item.replace("_", " ") for item in text.split())


LISTS: dict[str, tuple[str, ...]] = {
    "name": words(
        "Alice Martin Julia Peter Susan Victor Emma Oscar Laura Henry Diana Simon Rachel Felix Nora Walter Clara Hugo Ruth "
        "Edgar Marion Leonard Sylvia Gordon Helen Conrad Robert Marie Teresa Philip Monica Albert Sarah Stanley Irene "
        "Douglas Anna George Rosa Bernard"
    ),
    "person": words(
        "baker farmer teacher doctor nurse sailor painter lawyer singer dancer driver farmer's_wife captain carpenter "
        "plumber butcher gardener librarian neighbor cousin brother sister uncle aunt grandmother grandfather nephew niece "
        "student professor engineer surgeon dentist waiter chef tailor barber clerk cashier mayor senator judge sheriff "
        "soldier pilot astronaut scientist chemist biologist poet author editor reporter actor director violinist drummer "
        "pianist guitarist tourist guest visitor stranger widow twin toddler teenager shepherd fisherman blacksmith miner "
        "mechanic electrician janitor porter guard detective thief hermit king queen prince duchess knight wizard pirate "
        "monk bishop landlord tenant referee goalkeeper swimmer runner cyclist coach umpire magician clown juggler merchant "
        "banker broker secretary manager owner inspector surveyor ranger lifeguard beekeeper"
    ),
    "people": words(
        "children students neighbors workers tourists sailors farmers soldiers dancers actors teachers visitors guests "
        "cousins scouts campers hikers fans players voters parents villagers musicians nurses guards shoppers passengers"
    ),
    "animal": words(
        "dog cat horse donkey cow goat sheep pig rabbit squirrel fox wolf bear deer moose badger beaver otter hedgehog "
        "mouse rat bat owl eagle hawk falcon raven crow sparrow robin pigeon duck goose swan heron pelican parrot penguin "
        "turtle lizard snake frog toad salmon trout shark whale dolphin octopus lobster crab beetle spider butterfly moth "
        "bee wasp ant cricket camel elephant giraffe zebra tiger lion leopard monkey kangaroo koala hamster puppy kitten"
    ),
    "thing": words(
        "table chair lamp basket bucket hammer ladder blanket pillow mirror candle bottle kettle teapot saucer spoon fork "
        "knife bowl plate jar barrel wagon bicycle canoe tractor engine wheel rope chain needle thread button ribbon "
        "jacket sweater scarf glove boot slipper helmet umbrella suitcase wallet purse necklace bracelet ring watch clock "
        "calendar notebook pencil envelope letter postcard map compass telescope camera radio piano violin trumpet guitar "
        "drum flute puzzle kite balloon doll marble statue painting portrait carpet curtain shelf drawer cupboard cabinet "
        "lantern torch shovel rake axe saw broom mop sponge towel soap comb razor bandage thermometer magnet battery "
        "keyboard printer folder stapler scissors ticket passport trophy medal crown sword shield anchor paddle fishing_net "
        "tent backpack whistle bell microphone tripod parcel crate"
    ),
    "food": words(
        "apple pear peach plum cherry banana orange lemon melon grape strawberry blueberry coconut pineapple tomato potato "
        "carrot onion cabbage spinach lettuce pumpkin cucumber garlic mushroom pepper bread butter cheese yogurt cream "
        "honey jam sugar cinnamon vanilla chocolate cookie cake pie pudding pancake waffle muffin biscuit sandwich soup "
        "stew salad rice pasta noodle sausage bacon ham turkey chicken omelet popcorn walnut almond peanut mustard vinegar"
    ),
    "drink": words("coffee tea milk water lemonade cider cocoa juice broth soda"),
    "place": words(
        "kitchen garden cellar attic hallway garage balcony library museum theater cinema hospital pharmacy bakery "
        "butcher_shop market supermarket station airport harbor bridge tunnel tower castle palace temple church cathedral "
        "school college factory warehouse office workshop barn stable meadow forest desert valley canyon mountain volcano "
        "island beach lagoon river creek waterfall lake swamp village suburb city park playground stadium gymnasium "
        "restaurant tavern hotel cottage cabin courtyard fountain cemetery lighthouse windmill vineyard orchard greenhouse "
        "laboratory courtroom prison embassy parliament post_office bank bookstore laundry studio gallery"
    ),
    "town": words(
        "Boston Denver London Paris Berlin Madrid Lisbon Oslo Vienna Dublin Chicago Toronto Sydney Cairo Athens Moscow "
        "Warsaw Geneva Havana Lima Kenya Canada Norway Portugal Iceland Brazil Morocco"
    ),
    "color": words("red blue green yellow purple brown gray pink white black silver golden scarlet"),
    "material": words("wooden leather plastic copper velvet marble woolen cotton rubber glass iron steel paper stone"),
    "quality": words(
        "small large tiny huge heavy light old new broken rusty shiny dusty dirty clean narrow wide round square flat "
        "curved crooked smooth rough soft sturdy fragile cheap expensive precious ordinary peculiar ancient modern empty "
        "hollow thick thin sharp colorful pale bright gloomy elegant ugly plain fancy handmade borrowed forgotten missing "
        "damaged enormous splendid curious familiar"
    ),
    "mood": words(
        "happy sad angry tired nervous cheerful lonely proud shy clever foolish gentle patient hungry thirsty sleepy brave "
        "timid honest polite rude generous greedy jealous careful careless famous young elderly friendly stubborn quiet "
        "noisy lazy busy anxious grateful puzzled worried confident humble"
    ),
    "taste": words(
        "fresh ripe sweet sour bitter salty spicy warm cold frozen baked fried roasted stale delicious creamy"
    ),
    "weather": words("rain snow thunder fog sunshine wind hail lightning frost drizzle mist heat"),
    "moment": words(
        "today yesterday on_Monday on_Tuesday on_Wednesday on_Thursday on_Friday on_Saturday on_Sunday last_week "
        "last_month last_winter last_summer this_morning this_evening in_January in_February in_March in_April in_August "
        "in_September in_October in_December before_breakfast after_lunch after_dinner before_sunrise at_midnight at_noon "
        "during_the_holidays in_the_afternoon for_the_first_time a_moment_ago an_hour_later all_night_long"
    ),
    "later": words(
        "tomorrow next_week next_Monday next_Friday next_spring next_autumn soon tonight later_on in_ten_minutes "
        "in_a_few_days before_Christmas after_the_concert once_a_year as_soon_as_possible by_Thursday within_an_hour"
    ),
    "often": words("always never often rarely usually sometimes seldom still nearly_always hardly_ever"),
    "manner": words(
        "slowly quickly carefully quietly loudly gently suddenly happily sadly proudly eagerly calmly politely bravely "
        "secretly gladly patiently nervously gracefully clumsily silently cheerfully reluctantly boldly"
    ),
    "number": words(
        "two three four five six seven eight nine ten eleven twelve thirteen fifteen sixteen twenty thirty forty fifty "
        "eighty ninety several"
    ),
    "unit": words("minutes hours days weeks months years miles pounds dollars meters gallons inches"),
    "took": words(
        "carried dropped found lost sold bought borrowed repaired painted polished hid stole cleaned wrapped lifted pushed "
        "pulled packed measured drew broke returned collected inspected admired described photographed noticed ordered "
        "wanted replaced examined balanced delivered discovered abandoned fixed tossed buried"
    ),
    "take": words(
        "carry find sell buy borrow repair paint polish hide clean wrap lift push pull pack measure draw break return "
        "collect inspect describe notice order replace examine deliver fix bury move bring keep hold touch weigh choose"
    ),
    "ate": words("ate cooked baked tasted served sliced shared chopped prepared sampled burned refused swallowed"),
    "eat": words("eat cook bake taste serve slice share chop prepare finish refuse order"),
    "went": words(
        "walked ran drove hurried wandered marched cycled traveled returned climbed rushed crept strolled galloped moved "
        "jogged sailed limped danced"
    ),
    "saw": words(
        "saw heard watched followed chased met called greeted visited helped thanked ignored warned surprised frightened "
        "invited trusted remembered recognized avoided photographed admired comforted startled"
    ),
    "see": words("see hear watch follow meet call visit help thank ignore warn invite trust remember avoid teach join"),
    "rested": words(
        "slept laughed waited cried sneezed smiled whispered shouted rested trembled yawned vanished arrived disappeared "
        "hesitated sang whistled giggled coughed paused stumbled frowned"
    ),
    "rest": words("sleep laugh wait sing smile rest practice study dance swim dream argue whistle shout work exercise"),
    "roamed": words("barked slept jumped waited crawled hid swam drank growled rested wandered sat stood dug"),
    "near": words(
        "near behind beside inside outside across_from above below next_to in_front_of close_to far_from beyond "
        "around_the_corner_from"
    ),
    "through": words("through across around past into toward along over away_from back_to"),
    "subject": words(
        "history music science biology chemistry geography poetry language mathematics medicine politics religion "
        "architecture astronomy philosophy"
    ),
    "idea": words(
        "story rumor question answer reason secret promise mistake problem joke plan theory rule lesson proverb song poem "
        "recipe method opinion"
    ),
    "body": words("hand shoulder elbow knee ankle finger thumb nose ear throat stomach tooth wrist back heel neck"),
    "owner": words("my our your his her their the the the"),
    "one": words("a a the this that another every my our"),
    # phrases
    "who": (
        "{owner} {person}",
        "{owner} {mood} {person}",
        "{name}",
        "{name}'s {person}",
        "the {person} from {town}",
        "a {mood} {person}",
        "one of the {people}",
    ),
    "what": (
        "{one} {quality} {thing}",
        "{one} {color} {thing}",
        "{one} {material} {thing}",
        "{owner} {thing}",
        "{owner} {quality} {material} {thing}",
    ),
    "beast": ("{one} {animal}", "the {color} {animal}", "{owner} {mood} {animal}", "a {quality} {animal}"),
    "dish": (
        "some {taste} {food}",
        "the {taste} {food}",
        "{food} and {food}",
        "a {food} {food}",
        "{owner} {food} with {drink}",
    ),
    "where": (
        "{near} the {place}",
        "in the {quality} {place}",
        "at the {place} in {town}",
        "in the {place}",
        "{near} {owner} {place}",
    ),
}

SENTENCES: tuple[str, ...] = (
    "{who} {took} {what} {where}",
    "{who} {took} {what} {moment}",
    "{moment}, {who} {took} {what}",
    "{who} {went} {manner} {through} the {place}",
    "{who} and {who} {went} {through} the {place} {moment}",
    "{who} {ate} {dish} {moment}",
    "{who} {ate} {dish} {where}",
    "{beast} {roamed} {manner} {where}",
    "{beast} {roamed} {where} and {rested}",
    "{who} {saw} {who} {where}",
    "{who} {saw} {beast} {where} {moment}",
    "{who} never {saw} {who} again",
    "{who} will {take} {what} {later}",
    "we will {see} {who} {later}",
    "they can't {take} {what} without {number} {people}",
    "you should {often} {see} {who} {where}",
    "please {take} {what} and {take} {what}",
    "please don't {take} {what} {where}",
    "did {who} {take} {what} {moment}",
    "why would {who} {take} {what} {later}",
    "where did {who} {see} {beast}",
    "can you {take} {what} for {who}",
    "how many {people} will {rest} {where}",
    "there were {number} {people} {where} {moment}",
    "there is {what} {near} {what}",
    "it took {who} {number} {unit} to {take} {what}",
    "it's {number} {unit} from {town} to the {place}",
    "the {place} in {town} is {quality} and {quality}",
    "the {weather} lasted for {number} {unit} {where}",
    "because of the {weather}, {who} {rested} {where}",
    "after the {weather}, the {people} {went} {through} the {place}",
    "when the {weather} came, {beast} {roamed} {where}",
    "if {who} {took} {what}, {who} would be {mood}",
    "{who} looked {mood}, but {who} {rested}",
    "{who} is {mood} and {often} {mood}",
    "{who} studied {subject} and {subject} in {town}",
    "{who} wrote a {quality} {idea} about {subject}",
    "nobody believed the {idea} about {beast}",
    "{who} told us a {idea} about {who}",
    "tell {who} the {idea} about {what}",
    "I don't know the {idea}, said {who}",
    "I think {who} will {eat} {dish}",
    "she would rather {eat} {dish} than {dish}",
    "he hurt his {body} and his {body} {moment}",
    "{who} hurt {owner} {body} {where}",
    "we didn't {eat} {dish} {moment}",
    "the {people} will {eat} {dish} {later}",
    "{number} {people} {took} {what} {manner}",
    "the {people} {rested} {manner} while {who} {rested}",
    "{who} gave {who} {what}",
    "{who} {often} {ate} {dish} and some {drink}",
    "give {who} some {drink} and {dish}",
    "the price of {food} and {drink} rose by {number} dollars",
    "{who} was born in {town} and moved to {town}",
    "the {color} {thing} belongs to {who}",
    "which {thing} did {who} {take} first",
    "let's {rest} {where} and {eat} {dish}",
    "I'm going to {rest} {where} {later}",
    "this {thing} is too {quality} for {who}",
    "both {people} and {people} {rested} {moment}",
)

# Commands: what each intent (action, object, location) may be called, and the few words that may go around it. They are short, so
# that a mean over time still tells something of what was said: log-mel means are at chance on long ones.
INTENTS: dict[tuple[str, str, str], tuple[str, ...]] = {
    ("activate", "lights", "kitchen"): ("kitchen lights on", "light the kitchen"),
    ("deactivate", "lights", "kitchen"): ("kitchen lights off", "kitchen dark"),
    ("activate", "lamp", "bedroom"): ("bedroom lamp on", "lamp on in the bedroom"),
    ("deactivate", "lamp", "bedroom"): ("bedroom lamp off", "lamp off in the bedroom"),
    ("activate", "music", "none"): ("play music", "music on"),
    ("deactivate", "music", "none"): ("stop music", "music off"),
    ("increase", "volume", "none"): ("volume up", "louder"),
    ("decrease", "volume", "none"): ("volume down", "quieter"),
    ("increase", "heat", "washroom"): ("heat the washroom", "washroom heat up"),
    ("decrease", "heat", "washroom"): ("cool the washroom", "washroom heat down"),
    ("change_language", "german", "none"): ("speak german", "german language"),
    ("change_language", "english", "none"): ("speak english", "english language"),
    ("bring", "juice", "none"): ("fetch juice", "juice"),
    ("bring", "shoes", "none"): ("fetch shoes", "shoes"),
}
CARRIERS = (
    "{core}",
    "please {core}",
    "{core}, please",
    "now {core}",
    "{core} now",
    "okay, {core}",
    "hey, {core}",
    "{core}, thanks",
)

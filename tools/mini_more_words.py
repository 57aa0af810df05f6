"""Words and patterns of what joined the corpus `mini` later: single words, sentences with slots, styles, more commands.

A pattern's slot `{city}` is filled from a list below; the filled words carry its label. As in `mini_words.py`, an underscore
stands for a space inside an item, and every word is in the CMU pronouncing dictionary.
"""

from __future__ import annotations

from mini_words import words

# Keyword spotting: the ten words of Speech Commands, and others, of which a split has its own.
KEYWORDS = words("yes no up down left right on off stop go")
UNKNOWN_WORDS = {
    "train": words(
        "bed bird cat dog happy house tree wow zero one two three four five garden water yellow window paper music never "
        "open chair nine table mother green robin kettle river pencil morning"
    ),
    "dev": words("six seven marble sister kitchen orange cold again"),
    "test": words("eight visual forward summer button learn purple father winter hello engine backward monday night"),
}

# Sentences with slots.
SLOT_LISTS: dict[str, tuple[str, ...]] = {
    "city": words(
        "Boston Denver London Paris Berlin Madrid Lisbon Vienna Dublin Chicago Toronto Sydney Cairo Athens Moscow Dallas "
        "New_York San_Diego Las_Vegas Mexico_City"
    ),
    "date": words(
        "today tomorrow tonight on_Monday on_Tuesday on_Wednesday on_Thursday on_Friday on_Saturday on_Sunday next_week "
        "this_weekend next_Friday tomorrow_morning"
    ),
    "time": words(
        "seven_thirty six_o'clock noon midnight five_fifteen eight_forty nine_o'clock ten_thirty half_past_four "
        "quarter_to_three eleven_o'clock two_twenty"
    ),
    "number": words("two three four five six seven eight nine ten twelve"),
    "cuisine": words("Italian Chinese Mexican Indian Thai French Greek Spanish Korean vegetarian"),
    "genre": words("jazz blues country opera soul classical_music heavy_metal folk reggae disco"),
    "artist": words(
        "Monica_Stone Victor_Bell Julia_Rivers Oscar_Young The_Silver_Birds Rosa_Marino The_Lost_Brothers Henry_Walker "
        "Anna_Golden The_Night_Owls"
    ),
    "task": words(
        "water_the_plants call_my_mother buy_milk pay_the_rent feed_the_cat take_my_medicine book_a_flight "
        "clean_the_kitchen return_the_books charge_the_car"
    ),
}
SLOT_SENTENCES: tuple[str, ...] = (
    "book a table for {number} at {time}",
    "book {cuisine} food for {number} {date}",
    "find a {cuisine} restaurant in {city}",
    "I'd like a {cuisine} place in {city} {date}",
    "reserve a table in {city} at {time}",
    "set an alarm for {time}",
    "wake me up at {time} {date}",
    "remind me to {task} {date}",
    "remind me to {task} at {time}",
    "will it rain in {city} {date}",
    "what's the weather in {city}",
    "how cold is it in {city} {date}",
    "play some {genre}",
    "play {genre} by {artist}",
    "I want to hear {artist}",
    "put on {artist} at {time}",
    "is {artist} playing in {city}",
    "get {number} tickets for {artist} {date}",
    "play {number} {genre} songs",
    "any {genre} concerts in {city}",
)

# Styles: the same sentences are said in every style, so that the words tell nothing. Four sentences a session.
STYLE_SENTENCES: tuple[tuple[str, ...], ...] = (
    ("the bus is at the corner", "we put it on the shelf", "she will be back at seven", "it is in the other room"),
    (
        "I left my coat at school",
        "they are coming over tonight",
        "the water is in the jug",
        "he said it was nearly done",
    ),
    ("you can read the letter", "my sister lives in town", "the shop opens at nine", "that was all I saw"),
    ("we are waiting for the train", "the key is under the mat", "there is a man at the door", "I will do it tomorrow"),
    ("the paper is on the table", "he went home an hour ago", "this is the last one", "you know what it means"),
)

# Commands, by intent (action, object, location) and split. Each is spoken in words that sound alike, so that a mean over time
# says something of it: on the first set (`INTENTS` of `mini_words.py`) time means of log-mel frames are close to chance.
MORE_INTENTS: dict[tuple[str, str, str], dict[str, tuple[str, ...]]] = {
    ("activate", "alarm", "garden"): {
        "train": words(
            "garden_alarm arm_garden_alarm start_garden_alarm garden_alarm,_garden_alarm arm_our_garden_alarm "
            "start_our_garden_alarm garden_alarm,_arm large_garden_alarm"
        ),
        "dev": words("garden_alarm,_start arm_large_garden_alarm our_garden_alarm,_arm alarm,_garden_alarm"),
        "test": words(
            "our_garden_alarm start_large_garden_alarm arm_garden,_garden_alarm start,_start_garden_alarm "
            "garden,_arm_alarm our_large_garden_alarm"
        ),
    },
    ("deactivate", "phone", "home"): {
        "train": words(
            "no_phone_at_home no,_no_phone_at_home home,_no_phone oh_no,_no_phone_at_home don't_phone_home "
            "oh,_don't_phone_home no_phone,_no,_home_alone close_home_phone"
        ),
        "dev": words("no_home_phone oh,_close_home_phone don't,_don't_phone_home home_alone,_no_phone"),
        "test": words(
            "no,_no_home_phone oh_no,_don't_phone_home home_phone,_no close,_close_home_phone no,_don't_phone_home "
            "oh,_home,_no_phone"
        ),
    },
    ("increase", "zoom", "room"): {
        "train": words(
            "zoom_to_room_two zoom,_room_two zoom,_zoom_to_room_two room_two,_zoom move,_zoom_to_room zoom_to_room,_zoom "
            "do_zoom_to_room_two room,_zoom,_zoom"
        ),
        "dev": words("room_two,_zoom,_zoom do_zoom_room_two zoom_room,_zoom move_room,_zoom"),
        "test": words(
            "zoom_room_two zoom,_do_zoom_to_room room,_zoom_to_two move_to_room_two,_zoom zoom_to_room,_to_room "
            "room_two,_do_zoom"
        ),
    },
    ("bring", "hammer", "none"): {
        "train": words(
            "a_hammer hammer,_hammer grab_a_hammer hand_that_hammer a_hammer,_grab_that that_hammer grab_a_black_hammer "
            "pack_that_hammer"
        ),
        "dev": words("hand_a_hammer grab,_grab_that_hammer a_black_hammer hammer,_a_hammer"),
        "test": words(
            "grab_that_hammer a_hammer,_a_hammer hammer,_that_hammer hand_a_black_hammer pack_a_hammer that_black_hammer"
        ),
    },
    ("bring", "socks", "none"): {
        "train": words(
            "six_socks fetch_six_socks six_silk_socks six_thick_socks socks,_six_socks six_socks,_six sixty_six_socks "
            "six_soft_socks"
        ),
        "dev": words("six,_six_socks sixty_silk_socks socks,_socks,_socks six_soft_silk_socks"),
        "test": words(
            "sixty_socks six_thick_silk_socks socks,_sixty_socks sixty_six_silk_socks six_socks,_six_socks sixty_soft_socks"
        ),
    },
    ("bring", "tea", "none"): {
        "train": words(
            "green_tea tea,_green_tea three_green_teas we_need_tea sweet_green_tea he_needs_green_tea she_needs_three_teas "
            "tea,_we_need_tea"
        ),
        "dev": words("we_need_green_tea three_sweet_teas he_needs_three_teas cheap_green_tea"),
        "test": words(
            "three_teas she_needs_green_tea we_need_sweet_tea green_tea,_sweet_tea he_needs_sweet_green_tea we_need_three_teas"
        ),
    },
}

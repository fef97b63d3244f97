"""Word lists of the synthetic text: keys to be looked up and filler words to hide them among.

Every word is one token of the reference model's tokenizer. The lists are disjoint, so that a filler sentence can
never mention a key by accident.
"""

_KEYS = """
anchor ankle apple apron arrow badge bakery balloon banana banjo barn barrel basket beach beaver bell belt bench berry
bicycle biscuit blanket boat bottle bowl bracelet branch bread brick bridge broom brush bucket buffalo bus butter
button cabbage cabin cactus cake camel camera candle canoe canyon carpet carrot castle cellar chain chair cheese
cherry chimney circus clock cloud coat coconut coffee comb compass cottage cow crab cradle crayon crown cup curtain
cushion daisy desert desk diamond dolphin donkey door dragon drawer drum duck eagle ear easel elbow elephant engine
eraser falcon feather fence fern ferry fiddle finger flag flame flute forest fork fountain fox frog garden garlic gate
giraffe glacier glove goat grape guitar hammer hamster harbor harp hat hawk hedge helmet honey horse hotel iceberg
igloo island ivory jacket jaguar jar jelly jewel kettle keyboard kitchen kite knee ladder lagoon lake lamp lantern
lemon leopard lettuce library lion lizard lobster magnet mango map marble mask meadow melon mirror monkey moon
mountain mouse mushroom napkin necklace needle nest noodle oak oasis ocean olive onion orange orchard otter oven owl
oyster paddle palace pancake panda parrot peach peacock pear pebble pencil penguin pepper piano pigeon pillow pine
pirate planet plate plum pocket pony potato pumpkin puzzle quilt rabbit raccoon radio raft rainbow ribbon river robot
rocket rope rose saddle sailor salad sandwich saucer scarf school seal shark sheep shell shoe shovel spider spoon
squirrel stable statue stove sweater table teapot temple tiger tomato tower tractor trumpet tulip tunnel turtle
umbrella vase violin volcano waffle wagon walnut whale
"""

_FILLERS = """
able about above abroad absent accept across active actual adapt add adjust admire admit adopt advance advise afford
afraid again against agree ahead aim alert alike alive allow almost alone along already also although always amaze
among amount amuse ancient angry announce annual another answer any apart apologize appear applaud apply approve
argue arise around arrange arrive aside ask asleep assist assume attach attempt attend average avoid awake aware
away awful awkward baby back bad balance bare bargain basic be beautiful because become before begin behave behind
believe belong below beside best better between beyond big bitter blame blind bold borrow both bother bound brave
break breathe brief bright bring broad brought build burn busy but buy by calm can capable care careful carry catch
cause cautious cease certain chance change charge charm chase cheap cheerful choose civil claim clean clear clever
climb close clumsy cold collect combine come comfort common compare compete complain complete conceal concern
confess confirm confuse connect consider consist contain content continue convince cook cool copy correct cost could
count courage cover crawl create cross crowd cruel cry curious current custom damp dance danger dare dark dawn dear
decide declare decline deep defend delay deliver demand deny depart depend describe deserve desire detail develop
differ dig dim dine direct dirty discover discuss display distant divide do doubt down drag dream dress drift drink
drive drop dry due dull during dusty duty each eager early earn easy eat effort eight either elegant else empty end
endless endure enjoy enough enter entire equal escape even evening event ever every evident exact examine excite
excuse exist expect explain explore extend extra face fact fade fail faint fair faith fall false familiar famous far
fast fear feel fellow few fierce fill final fine finish firm first fit five fix flat flee float flow fold follow
fond foolish forget forgive formal forward four free frequent fresh friendly frighten from front full funny further
future gain gather generous gentle get give glad gloomy go good grace gradual grand grateful gray greet grow guess
guide habit half handle happen happy hard harm haste hate have heal hear heavy help hesitate hide high hint hold
hollow honest hope hour however huge humble hungry hurry idle ignore imagine imitate improve inside intend invite
join joke journey judge jump just keen keep kind know large last late laugh lazy lead learn leave lend less let light
like listen little live local lonely long look lose loud lovely low loyal lucky mad main make manage many march mark
matter may mean measure meet mend mention merry might mild mind minute modern modest moment month more morning most
move much music must mystery narrow natural near neat need neither never new next nice night noble noise none normal
nothing notice now obey observe obtain obvious occur odd offer often old once only open oppose order ordinary other
ought outside over own pack pain pale partly pass patient pause peace perfect perhaps permit persuade plain plan
play please plenty polite poor popular possess practice praise precious prefer prepare present pretend pretty
prevent promise proper protect proud prove provide public pull pure pursue push quick quiet quite raise rapid rare
rather reach read ready real reason receive recent refuse regret relax rely remain remember remind remove repair
repeat reply request rescue respect rest return reveal rich right rise rough round rude run sad safe same save say
search season second secret seem seldom send serious settle seven several shake shallow share sharp shine short
should shout show shy sick silent silly similar simple since sing six sleep slight slow smart smile smooth soft solid
some soon sore sorry sour speak spend stand start stay steady steep stiff still stop strange strict strong struggle
"""

#: 256 everyday nouns: needle keys and variable names.
KEYS: tuple[str, ...] = tuple(_KEYS.split())

#: Words of the "essay" haystack and values of the associative-recall primer.
FILLERS: tuple[str, ...] = tuple(_FILLERS.split())

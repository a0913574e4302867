"""Synonyms and generic words of the catalogue's nouns, and what captions must know about words."""

# noun: synonym, ..., ~generic word, ...
SYNONYMS = """
acacia tree: ~tree
abdominal bench: workout bench, exercise bench, gym bench, ~bench
air mattress: inflatable mattress, airbed, ~mattress
angle grinder: power grinder, ~power tool, ~tool
aquarium: fish tank, fishbowl
armchair: easy chair, upholstered chair, lounge chair, arm chair, club chair, ~chair, ~seat
ashtray: ash tray
backpack: rucksack, school bag, knapsack, ~bag
bamboo: ~plant
banknote: bank note, paper money, euro bill, ~money
bar stool: barstool, high stool, counter stool, ~stool
bar table: high table, bistro table, ~table
barrel: wooden barrel, cask, wine barrel, keg
basketball: ~ball
basketball net: basketball hoop, basketball backboard
bathmat: bath mat, bath rug, ~mat
bathtub: bath tub, bath, tub
beach chair: folding beach chair, deck chair, ~chair
bed: double bed, bed with pillows, bedstead
bedside table: nightstand, night stand, night table, ~table
beech tree: ~tree
beer bottle: ~bottle
beer glass: glass of beer, pint of beer, beer mug, beer
bench: seat bench, park bench, wooden bench, ~seat
bicycle: bike, push bike, pushbike, road bike, city bike, ~cycle
bidet: bathroom bidet
biplane: airplane, aeroplane, plane, toy airplane, aircraft
birthday cake: cake, cake with candles
blender: food blender, kitchen blender, ~kitchen appliance
bonsai tree: bonsai, miniature tree, potted tree, ~tree
book: closed book, hardcover book, hardback
bookcase: bookshelf, book case, book shelf, ~shelf, ~shelves
boot: ~shoe
bottle: soap bottle, dispenser bottle
bowl: dish, kitchen bowl
box: storage box, container
boy: young boy, standing boy, child, kid
bread: loaf of bread, loaf, bread loaf
bread box: bread bin, ~box
briefcase: attache case, suitcase, ~bag
broom: sweeping broom, besom
brush: hairbrush, hair brush
bulldog: dog, english bulldog, ~animal
bunk bed: bunkbed, double-decker bed, ~bed
bus: passenger bus, coach, omnibus, ~vehicle
bush: shrub, garden bush, ~plant
butter: stick of butter, butter dish, butter block
cabinet: cupboard, storage cabinet
cactus: potted cactus, cactus in a pot, cactus plant, cacti, ~plant, ~potted plant
cafe chair: bistro chair, ~chair
cafe table: bistro table, round cafe table, ~table
calendar: desk calendar
camera: photo camera, digital camera
camping lamp: camping lantern, lantern, oil lamp, ~lamp
camping tent: tent, dome tent
candle: lit candle, wax candle
cap: hat, baseball hat
car: automobile, passenger car, motor car, auto, ~vehicle
cardboard box: carton, cardboard carton, packing box, ~box
cat: kitty, feline, house cat, kitten, ~animal
ceiling fan: ~fan
ceiling lamp: ceiling light, ~lamp
chair: dining chair, side chair, seat
chandelier lamp: chandelier, hanging lamp, ~lamp
changing table: baby changing table, ~table
chessboard: chess board, chess set, chess game
chest freezer: deep freezer, freezer, ~appliance
chicken: hen, chook, ~bird, ~animal
child's bed: kid's bed, children's bed, kids bed, ~bed
child's chair: kid's chair, children's chair, small chair, ~chair
child's table: kid's table, children's table, small table, ~table
chopping board: cutting board, wooden cutting board
christmas tree: decorated christmas tree, xmas tree, ~tree
clock: alarm clock, desk clock
clothes basket: laundry basket, hamper, laundry hamper, ~basket
clothes dryer: tumble dryer, dryer, drying machine, ~appliance
clothes hanger: coat hanger, hanger, coathanger
clothes horse: drying rack, laundry rack, clothes drying rack
clothes rack: clothing rack, garment rack, clothes rail
cocktail glass: martini glass, cocktail, ~glass
coconut tree: coconut palm, palm tree, palm, ~tree
coffee cup: cup of coffee, coffee, ~cup
coffee maker: coffee machine, coffeemaker, drip coffee maker
coffee table: low table, living room table, ~table
comb: hair comb
computer: pc, personal computer
cooktop: stove top, hob, ~stove
cordless phone: ~phone, ~telephone
corner sofa: sectional sofa, sectional couch, l-shaped sofa, corner couch, ~sofa, ~couch
cosmetics pot: cream jar, cosmetics jar, ~jar
cradle: ~bed
crate: wooden crate, wooden box, ~box
creamer: milk jug, cream pitcher, pitcher, jug
crib: baby crib, cot, baby bed, ~bed
cuckoo clock: wall clock, ~clock
cup: teacup, tea cup, drinking cup
cupboard: cabinet, closet
cupcake: muffin, cup cake, ~cake
curtain: curtains, drapes, window curtain
cypress tree: cypress, ~tree
dartboard: dart board, darts
day bed: daybed, ~bed
deck chair: deckchair, outdoor lounge chair, sun lounger, folding deck chair, ~chair
deep fryer: fryer, ~kitchen appliance
deer: stag, buck, reindeer, ~animal
desk: writing desk, office desk, computer desk, work table, ~table
desk lamp: table lamp, reading lamp, adjustable lamp, ~lamp
diving board: springboard
dog: hound, puppy, pet dog, canine, ~animal
dog house: doghouse, kennel, dog kennel
doll: toy doll, rag doll, ~toy
doll house: dollhouse, toy house, doll's house, ~house
door: interior door, wooden door
doorbell: door bell
doormat: door mat, welcome mat, ~mat
double arched window: arched window, ~window
double door: double doors, ~door
double door with panes: glass double door, french doors, ~door
double french window 3 panes: french window, ~window
double french window small panes: french window, ~window
double oven: wall oven, ~oven
double vanity: bathroom vanity, double sink, double washbasin
double window 3 panes: window with panes, ~window
double window 4 panes: window with panes, ~window
double window with large pane: ~window
double-hung window: sash window, ~window
drafting table: drawing table, ~table
drawer cabinet: chest of drawers, kitchen drawers, drawers, ~cabinet
dress: gown, woman's dress, ~clothes
dresser: chest of drawers, bureau, commode, drawers
dressing table: vanity table, makeup table, vanity, ~table
drill: electric drill, power drill, hand drill, ~tool
dvd player: video player, disc player
electric guitar: guitar, rock guitar, solid-body guitar, ~musical instrument
electronic keyboard: ~musical instrument
elevator: lift
elevator door: lift door, ~door
emergency sign: exit sign, ~sign
escalator: moving staircase, ~stairs
espresso machine: coffee machine
exercise bike: stationary bike, indoor bike, spin bike, exercise bicycle
exterior door: front door, entrance door, house door, ~door
fan: standing fan, electric fan, floor fan
fence: wooden fence, garden fence, picket fence
ficus: ficus tree, rubber plant, ~plant, ~tree
filing cabinet: file cabinet, office cabinet, ~cabinet
fire extinguisher: extinguisher
fire hydrant: hydrant, fireplug
fireplace: hearth, open fireplace
fitness tower: gym machine, exercise machine, power tower
flashlight: torch, hand torch, pocket lamp
floor chair: ~seat
flower box: flower planter, window box, planter with flowers, ~flowers
flowers: bouquet, bouquet of flowers, bunch of flowers, vase of flowers
fluorescent light: fluorescent lamp, ~lamp
fluorescent strip: fluorescent lamp, ~lamp
folded clothes: stack of clothes, pile of clothes, ~clothes
folding chair: foldable chair, fold-up chair, ~chair
folding screen: room divider, privacy screen, japanese screen
folding table: foldable table, ~table
foosball table: table football, table soccer, football table
fork: dinner fork, table fork, ~cutlery
forklift: forklift truck, fork truck, ~vehicle
fountain: water fountain, stone fountain, garden fountain
french fries: fries, chips, fried potatoes
futon: futon bed, floor bed, ~bed, ~mattress
futon couch: futon sofa, ~sofa, ~couch
game console: video game console, gaming console
game controller: gamepad, video game controller, joystick, joypad
garage door: ~door
garden faucet: tap, faucet, water tap, spigot
garden hut: garden shed, shed, wooden shed, cabin, hut
garden lamp: outdoor lamp, ~lamp
gift: present, gift box, wrapped gift, wrapped present
girl: young girl, standing girl, child, kid
glass: drinking glass, water glass, tumbler
glass door: ~door
glass table: table with glass top, glass top table, ~table
glasses: eyeglasses, spectacles, pair of glasses
glove: leather glove, hand glove
grand piano: piano, concert piano, piano with open lid, ~musical instrument
grill: barbecue, barbecue grill
hamburger: burger, cheeseburger, sandwich
hammer: claw hammer, ~tool
hammock: hanging bed, garden hammock
handbag: purse, hand bag, lady's bag, ~bag
hanging clothes: clothes on hangers, ~clothes
hanging light: hanging lamp, pendant light, pendant lamp, ~lamp
hat: brimmed hat, fedora
headphones: headset, earphones, pair of headphones
hedge: hedgerow, garden hedge, ~bush
helmet: motorcycle helmet, crash helmet
high hedge: hedge, tall hedge
high heels: women's shoes, high-heeled shoes, pair of high heels, ~shoes
horse: stallion, mare, pony, ~animal
hose reel: garden hose, hose
hospital bed: ~bed
hot dog: hotdog, sausage in a bun, sausage
intercom: door intercom
iron bed: metal bed, bed frame, ~bed
jacket: coat, leather jacket, blouson, ~clothes
jacuzzi: hot tub, whirlpool, spa tub
jar: pot, clay jar
keys: key ring, bunch of keys, key
kick scooter: scooter, push scooter
kitchen island: kitchen counter, counter, ~cabinet
kitchen scale: scale, weighing scale, food scale
kitchen utensil: ~tool
kitchen utensils: ~cutlery
knife: table knife, ~cutlery
knife block: set of knives, knives in a block, knife set
lamp: table lamp, floor lamp, light, lampshade
laptop: laptop computer, notebook computer, open laptop, ~computer
lawn mower: lawnmower, grass mower
letter tray: paper tray, document tray, ~tray
lily: lilies
lipstick: lip gloss
locker: metal locker, storage locker, ~cabinet
loft bed: high bed, mezzanine bed, ~bed
logs: firewood, wood logs, log pile, stack of logs
lounge chair: recliner, reclining chair, relax chair, garden chair, ~chair
mailbox: letter box, letterbox, post box, postbox, mail box
man: male person, standing man, gentleman, ~person, ~human
mannequin: dummy, shop dummy, ~person
maple tree: maple, ~tree
marker: marker pen, felt-tip pen, highlighter, ~pen
medicine bottle: pill bottle, pills, ~bottle
medicine box: pill box, ~box
microwave: microwave oven, ~kitchen appliance, ~oven
milk carton: carton of milk, milk, juice carton
mixer: stand mixer, kitchen mixer, food mixer, ~kitchen appliance
mobile phone: cell phone, cellphone, cellular phone, ~phone
moka pot: espresso pot, stovetop espresso maker, coffee pot, ~kettle
motorcycle: motorbike, motor bike, motor cycle, ~vehicle
mug: coffee mug, coffee cup, tea mug, ~cup
newspaper: folded newspaper, paper
office chair: desk chair, swivel chair, rolling chair, task chair, ~chair
oil bottle: ~bottle
orchids: orchid, potted orchid, orchid flower, ~flowers, ~potted plant
oven: kitchen oven, cooking oven, ~kitchen appliance
pallet: wooden pallet, shipping pallet
palm tree: palm, tropical tree, ~tree
pan: frying pan, skillet, cooking pan, saucepan
pants: trousers, pair of pants, pair of trousers, jeans, ~clothes
paper lantern: lantern, ~lamp
paper towel holder: paper towels, kitchen roll, paper towel roll
parasol: garden umbrella, beach umbrella, sun umbrella, patio umbrella, ~umbrella
party tent: ~tent
peach tree: ~tree
peace lily: spathiphyllum
pen holder: pencil cup, pencil holder, pen cup, pencil box
pencil: lead pencil
pendant lamp: hanging lamp, pendant light, ~lamp
perfume bottle: perfume, flacon, ~bottle
piano bench: piano stool, ~bench, ~stool
picture frame: framed picture, painting, framed painting, picture
pinball machine: pinball, arcade machine, pinball table
pine tree: pine, fir tree, conifer, evergreen tree, ~tree
ping pong paddle: table tennis racket, table tennis bat, ping pong bat
ping pong table: table tennis table, table tennis, ~table
place setting: plate with cutlery, dinner plate with fork and knife, plate and cutlery
planter: ~potted plant, ~plant
plant: potted plant, houseplant, house plant, pot plant, plant in a pot
plastic chair: garden chair, ~chair
plastic cup: paper cup, disposable cup, ~cup
plate: dinner plate, dish
playground: ~slide
pliers: cutting pliers, pair of pliers, ~tool
pool table: billiard table, billiards table, snooker table, ~table
poplar tree: poplar, ~tree
porch column: column, pillar, wooden column, post
pot: earthen pot, vase
potted plant: houseplant, house plant, plant in a pot, pot plant, ~plant
potty: chamber pot, baby potty
pouf: bean bag, beanbag, hassock, ottoman, ~seat
printer: ~office machine
puzzle: wooden puzzle, ~toy
puzzle cube: rubik's cube, magic cube, ~toy
punching bag: boxing bag, punching ball
quadruple arched window: arched window, ~window
quadruple french window: french window, ~window
quadruple french window 3 panes: french window, ~window
quadruple french window small panes: french window, ~window
rabbit: bunny, hare, bunny rabbit, ~animal
radiator: heater, heating radiator
radio: radio receiver, portable radio
rail crossing: railroad crossing, level crossing
rails: railroad tracks, train tracks, railway track
railing: handrail, balustrade, fence
range hood: kitchen hood, cooker hood, extractor hood
recycling bin: ~trash can, ~bin
refrigerator: fridge, icebox, ~kitchen appliance
fridge: refrigerator, icebox, ~kitchen appliance
remote control: tv remote, remote
ring: finger ring, gold ring, jewelry ring
roasted chicken: roast chicken, roast turkey, cooked chicken
rock: stone, boulder, big rock
rocking horse: wooden horse, toy horse, ~toy
round chimney: chimney | brick chimney
round table: circular table, ~table
rowboat: row boat, rowing boat, boat, wooden boat, dinghy
rug: carpet, area rug
ruler: measuring ruler
safe: strongbox, steel safe, vault
salt shaker: pepper shaker, shaker
sandpit: sandbox, sand box
sandwich maker: sandwich toaster, waffle iron, panini press
saw: handsaw, hand saw, ~tool
school desk: ~desk
scissors: pair of scissors, shears
scooter: motor scooter, moped, vespa, ~vehicle
screen door: mesh door, ~door
screwdriver: ~tool
security camera: surveillance camera, cctv camera, ~camera
surveillance camera: security camera, cctv camera, ~camera
seesaw: see-saw, teeter-totter
shelf: ~shelves
shelves: shelf, shelving unit, shelving, rack, bookshelf
shipping container: cargo container, freight container, container
shoe: leather shoe
shopping basket: grocery basket, ~basket
shorts: short pants, pair of shorts, ~clothes
shovel: spade, ~tool
shower: shower cabin, shower cubicle
shower curtain: ~curtain
shower door: glass shower door, ~door
shower head: shower, showerhead, shower faucet
shutter: window shutter, ~window
sink: kitchen sink, washbasin, basin
sitting boy: ~child
sitting girl: ~child
skateboard: skate board
skirt: woman's skirt, ~clothes
sleeping bag: camping bag
sliding window: ~window
slippers: pair of slippers, house shoes, ~shoes
smartphone: mobile phone, cell phone, cellphone, phone
smoke detector: smoke alarm
sneakers: sports shoes, running shoes, pair of sneakers, trainers, ~shoes
snowman: snow man
soccer ball: football, ~ball
soccer goal: football goal, goal net
sock: stocking
sofa: couch, settee, upholstered sofa, lounge sofa
sofa bed: convertible sofa, sleeper sofa, ~sofa, ~couch
speaker: loudspeaker, audio speaker, stereo speaker
speaker dock: ~stereo
spice rack: spice jars
spider plant: hanging plant, houseplant, ~potted plant, ~plant
spiral staircase: winding stairs, spiral stairs, stairs, staircase
sponge: bath sponge, kitchen sponge
spoon: table spoon, ~cutlery
sports car: race car, racing car, coupe, ~car, ~automobile, ~vehicle
spotlight: wall spotlight, ~lamp
spray bottle: sprayer, ~bottle
squeezer: juicer, citrus squeezer, lemon squeezer
stapler: office stapler
steak: piece of meat, meat
step ladder: stepladder, ladder
stereo: hi-fi, music system, boombox
stereo amplifier: amplifier, audio amplifier
stone lantern: japanese stone lantern, lantern, garden lantern
stool: wooden stool, seat stool, ~seat
stove: kitchen stove, cooking stove, range, gas stove, ~oven
street lamp: streetlight, street light, lamp post, lantern
stroller: baby stroller, baby carriage, pram, pushchair, buggy
succulent plant: succulent, houseplant, ~potted plant, ~plant
sugar bowl: sugar pot, ~bowl
suitcase: luggage, travel bag, travel case
sunglasses: pair of sunglasses, dark glasses, ~glasses
sun lounger: sun bed, chaise longue, outdoor lounger
suv: sport utility vehicle, off-road vehicle, jeep, ~car, ~automobile, ~vehicle
swimming pool: pool
swing: swing set, playground swing, garden swing
table: dining table, four-legged table, kitchen table
table fan: desk fan, electric fan, ~fan
tablet: tablet computer
tape measure: measuring tape, ~tool
tape roll: adhesive tape, roll of tape, sticky tape
tatami: tatami mat, straw mat, ~mat
teapot: tea pot, lidded teapot, ceramic teapot, ~kettle
teddy bear: stuffed bear, teddy, plush bear, toy bear, ~toy, ~bear
telephone: phone, desk phone, office phone
television: tv, tv set, flat-screen tv, television set, flat tv
television cabinet: tv cabinet, tv stand, ~cabinet
tennis racket: tennis racquet, racket, racquet
thermometer: temperature gauge
toaster: bread toaster, ~kitchen appliance
toaster oven: ~oven
toilet: toilet bowl, lavatory, toilet seat, wc, commode
toilet paper: toilet roll, toilet paper roll, bathroom tissue
towel: bath towel, folded towel
towel rack: towel rail, towel holder, towel on a rack
toy train: wooden train, train, toy locomotive, locomotive, ~toy
track lights: spotlights, track lighting, ~lamp
traffic cone: road cone, safety cone, cone, pylon
trampoline: garden trampoline
trash can: garbage can, waste bin, trash bin, rubbish bin, wastebasket, bin
tray: serving tray
treadmill: running machine, exercise machine
trestle table: ~table
tricycle: children's tricycle, trike, three-wheeler
triple french window: french window, ~window
truck: lorry, heavy truck, ~vehicle
trunk: chest, travel trunk, storage trunk
tulips: tulip, tulip flower, vase of tulips, ~flowers
turn window: ~window
tv stand: television stand, tv table, ~cabinet
umbrella: rain umbrella
upright piano: piano, cottage piano, ~musical instrument
urinal: wall urinal
utensil holder: utensils in a pot, kitchen utensils
van: minivan, delivery van, ~vehicle
vanity: bathroom vanity, bathroom sink, sink cabinet, washbasin
bathroom vanity: vanity
vase: flower vase, ceramic vase, jar, pot
video projector: projector
wall lamp: wall light, sconce, ~lamp
wardrobe: closet, armoire, clothes cupboard
washbasin: wash basin, bathroom sink, sink, wash-hand basin
washing machine: washer, laundry machine, clothes washer, ~appliance
watch: wristwatch, wrist watch
water cooler: water dispenser
water heater: boiler, hot water tank
wheelbarrow: garden cart, barrow
wheelchair: wheel chair, invalid chair
wheelie bin: trash can, garbage bin, ~bin
whiteboard: board, marker board
window blind: blinds, window blinds, venetian blind
wine bottle: bottle of wine, ~bottle
woman: female person, standing woman, lady, ~person, ~human
workbench: work bench, tool bench, ~table
xylophone: toy xylophone, glockenspiel, ~musical instrument
yucca plant: yucca, houseplant, ~potted plant, ~plant
toy: ~wooden toy
candle holder: candlestick, lantern, pierced candle holder
display cabinet: wall unit, glass cabinet, living room cabinet, ~cabinet, ~bookcase
keypad: entry keypad
kettle: tea kettle, whistling kettle, stovetop kettle, water kettle, tea pot, teapot
paper cup: takeaway coffee cup, coffee cup, disposable cup, ~cup
plastic crate: plastic box, storage box, storage crate, ~box, ~crate
sideboard: low cabinet, storage unit, buffet, ~cabinet
soap dispenser: liquid soap, soap bottle, pump bottle, ~bottle
spring rider: playground spring rider, toy motorcycle, rocking motorcycle, ~toy
storage cabinet: office cabinet, ~cabinet, ~shelves
wood stove: wood-burning stove, iron stove, furnace, ~stove, ~fireplace
toy car: ~vehicle
"""


def _words(text: str) -> frozenset[str]:
    return frozenset(word.strip() for word in text.replace("\n", " ").split(","))


# Words without an article at the end of a phrase; MASS only when it stands alone ("bread", but "a loaf of bread").
PLURALS = _words("""
apples, blinds, bookshelves, cacti, chips, clothes, curtains, cutlery, darts, doors, drapes, drawers, earphones,
eyeglasses, flowers, french, fries, furniture, glasses, headphones, heels, jars, jeans, keys, knives, lights,
lilies, logs, orchids, pants, pills, potatoes, rails, rolls, scissors, shears, shelves, shoes, shorts, slippers,
sneakers, spectacles, spotlights, stairs, sunglasses, towels, tracks, trainers, trousers, tulips, utensils, wheels
""")

MASS = _words("""
bamboo, beer, bread, butter, coffee, firewood, fruit, luggage, meat, milk, money, salad, shelving, soap, sushi
""")

# Nouns that people ask for: sampled three times and twice as often.
HEADLINE = _words("""
armchair, cactus, car, chair, sofa, sports car, table, teapot
""")

POPULAR = _words("""
backpack, barrel, bathtub, bed, bench, bicycle, biplane, birthday cake, bonsai tree, book, bookcase, boot, bottle,
bowl of fruit, bulldog, bus, camera, cat, chicken, christmas tree, clock, coffee cup, coffee table, corner sofa,
cup, deer, desk, desk lamp, dog, electric guitar, fire extinguisher, fire hydrant, fireplace, fridge, grand piano,
hamburger, hat, helmet, high heels, horse, kettle, lamp, laptop, microwave, motorcycle, mug, office chair, palm
tree, plant, potted plant, rabbit, refrigerator, rocking horse, rowboat, scooter, shoe, sneakers, snowman, soccer
ball, stool, suitcase, suv, teddy bear, television, toaster, toilet, toy train, trash can, tricycle, truck,
umbrella, upright piano, van, vase, washbasin, washing machine, wheelchair, wine bottle
""")

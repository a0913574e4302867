"""The names of the catalogue's models: a hand-written noun for every name that is not its own noun.

One line per catalogue name (or per model, by its key): ``name: noun | synonym, ..., ~generic word, ...``. The part
after the bar adds to what SYNONYMS says about the noun. A name without a line is its own noun, in lower case.
Trademarks give way to the thing they name.
"""

NAMES = """
acacia: acacia tree
air conditioning - external unit: air conditioner | outdoor air conditioner, air conditioning unit
air conditioning - internal unit: air conditioner | wall air conditioner, air conditioning unit
apple ibook: laptop
apple imac 1998: computer | desktop computer, old computer, computer monitor
apple imac 2004: computer | desktop computer, computer monitor, desktop computer with keyboard
apple iphone: smartphone
baby bed: cradle | baby bed, rocking cradle, crib, ~bed
baby high chair: high chair | baby chair, baby high chair, feeding chair, ~chair
bar chair: bar stool | bar chair, tall chair
barnum: party tent | canopy, marquee, gazebo, pavilion
bath: bathtub
basin: basin | washbasin, sink
bed: bed
bended coconut tree: coconut tree | bent palm tree
bill 10€: banknote
bill 20€: banknote
bill 50€: banknote
biplane: biplane
black table: table
blue pine under snow: pine tree | snowy pine tree, pine tree in snow
bootie: boot | ankle boot
bowl with fruits: bowl of fruit | fruit bowl, fruit in a bowl
bowl with salad: bowl of salad | salad bowl, salad
bullet trash can: trash can
burlap sofa: sofa | burlap sofa, fabric sofa
cap: cap | baseball cap
captain's bed: bed | bed with drawers, captain's bed, storage bed
car model: toy car | wooden toy car, wooden car, ~toy, ~car
cctv: security camera
chair with cushion: chair | chair with a cushion, upholstered chair
chevrolet: car | sedan
child bed: child's bed
child chair: child's chair
child hut: playhouse | children's hut, play house, wooden playhouse
child swing: swing
children chair: child's chair
children game: playground | playground slide, play structure, jungle gym
children table: child's table
chimney: chimney | brick chimney
city bus: bus
class seat: school desk | school desk with chair, classroom seat, school bench
clear sofa: sofa
clothes washing machine: washing machine
coffee brewer: coffee maker
coffee machine: espresso machine | coffee machine, espresso maker, ~coffee maker
coffee mug: mug
coffee press: french press | coffee press, ~coffee maker, ~coffee pot
comb: comb
concept sedan 01: car | sedan
concept sedan 02: car | sedan
concept sedan 02 sport: sports car
cone: traffic cone
contemporary living room: living room
convertible sofa bz: sofa bed | futon sofa
opened convertible sofa bz: sofa bed | opened sofa bed, futon, ~bed
cooker: stove | cooker
cooktop: cooktop
copper beech: beech tree | copper beech tree
corner bathtub: bathtub | corner bathtub, corner tub
corner sofa: corner sofa
couch: sofa
cup cake: cupcake
cutting pliers: pliers
cypress: cypress tree
dart game: dartboard
decorative plant: potted plant | decorative plant
desk table: desk | kids desk, child's desk
drawers cabinet: drawer cabinet
dresser with drawers: dresser
dryer machine: clothes dryer
dustbin: trash can | dustbin, office bin
electronic scale: kitchen scale
elevator: elevator
entry bell ring: doorbell
entry speech unit: intercom
espresso kettle: moka pot
extinguisher: fire extinguisher
ficus: ficus
fence: fence
flacon: perfume bottle
flipper: pinball machine
football goal: soccer goal
football table: foosball table
ford focus: car | hatchback
fork lift: forklift
frame chambord: picture frame
frame hôi an: picture frame
full bookcase: bookcase | full bookcase, bookcase with books, bookshelf with books
gaz water heater: water heater | gas water heater
electric water heater: water heater | electric water heater
glass table: glass table
girl: girl
grinder: angle grinder
hanging clothes: hanging clothes
hashtray: ashtray
high cabinet: cabinet | tall cabinet, kitchen cabinet
hood: range hood
indoor bike: exercise bike
indoor plant: potted plant | indoor plant
induction cooker 2 zones: cooktop | induction cooktop
induction cooker 4 zones: cooktop | induction cooktop
inkjet printer and scanner: printer | inkjet printer, scanner
intercom with screen: intercom | video intercom
island: kitchen island
island extension: kitchen island
island bath: bathtub | freestanding bathtub
japanese lantern: paper lantern | japanese lantern
japanese maple: maple tree | japanese maple tree
joystick: game controller
keyboard: electronic keyboard | piano keyboard, synthesizer, midi keyboard
kitchen tools: kitchen utensils | kitchen tools, cooking utensils
kitchen knife: knife | kitchen knife
knife stand: knife block
large fridge: refrigerator | large refrigerator
large pan: pan | large pan
large stove: stove | large stove
letters box: mailbox
lip stick: lipstick
little bank: bench
little lamp: lamp | small lamp, bedside lamp
little plant: potted plant | small plant, small potted plant
locked locker: locker
lying down boy: boy lying down | lying boy, ~boy
lying down female: woman lying down | lying woman, ~woman
lying down male: man lying down | lying man, ~man
male: man
female: woman
holding female: woman | standing woman, woman holding something
holding male: man | standing man, man holding something
sitting boy: sitting boy | boy sitting, seated boy, ~boy
sitting female: sitting woman | woman sitting, seated woman, ~woman
sitting girl: sitting girl | girl sitting, seated girl, ~girl
sitting male: sitting man | man sitting, seated man, ~man
mannequin female: mannequin | female mannequin
mannequin male: mannequin | male mannequin
mezzanine bed: loft bed
milk: milk carton
mini stereo: stereo
mobile phone: mobile phone
mocassin: shoe | moccasin, loafer
modern armchair: armchair | modern armchair
mower: lawn mower
mp3 base: speaker dock | music dock, ~speaker
mp3 station: speaker dock | music dock, radio, ~speaker
number lock: padlock
oak chair: chair | oak chair, wooden chair
oak table: table | oak table, wooden table
oil servers: oil bottle | oil cruet, oil and vinegar set
old jar: jar | old jar, clay jar
open cardboard box: cardboard box | open cardboard box, open box
osaka chair: chair | wooden chair
outdoor lamp: garden lamp
oval plate: plate | oval plate
painted bench: bench | garden bench, painted bench
park light: street lamp
street light: street lamp
classic lamppost: street lamp | lamppost, classic lamppost
park trashcan: trash can | park trash can
residential trashcan: wheelie bin
recycling bin: recycling bin
peach blossom: peach tree | blossoming tree, cherry tree
pedestal vase lamp: lamp | table lamp, vase lamp
pedestrian railing: railing
iron railing: railing | iron railing, metal railing
penbox: pen holder
pendant lamp: pendant lamp
peugeot 308 cc: car | convertible car, convertible
phone: telephone
piano bench: piano bench
pine: pine tree
pine under snow: pine tree | snowy pine tree, pine tree in snow
plant box: planter | plant box, flower box
plate, glass and cutlery: place setting
plate, glasses and cutlery: place setting
playstation: game console
pool lounge: sun lounger | pool lounger
poplar: poplar tree
porch light: wall lamp | porch light
pottery: pot | pottery, clay pot, ceramic pot
puff: pouf
punching ball: punching bag
rattan armchair: armchair | rattan armchair, wicker armchair, wicker chair, rattan chair
rattan sofa: sofa | rattan sofa, wicker sofa
rattan table: table | rattan table, wicker table
rectangle swimming pool: swimming pool
round swimming pool: swimming pool | round swimming pool
reflex camera: camera | reflex camera, slr camera
relax chair: lounge chair
renault scenic: car | minivan
seat leon: car | hatchback
rigged fan: fan
round carpet: rug | round rug, round carpet
oriental rug: rug | oriental rug, persian rug
rubik's cube: puzzle cube
ryokan chair: floor chair | legless chair, japanese chair, ~chair
screen: folding screen
short: shorts
shower head and faucet: shower head
shower stall: shower
siamese cat: cat | siamese cat
sink cabinet: bathroom vanity | sink cabinet, kitchen sink, ~cabinet, ~sink
small lavatory: washbasin | small washbasin
small lower cabinet: cabinet | base cabinet, kitchen cabinet
lower cabinet: cabinet | base cabinet, kitchen cabinet
lower corner cabinet: cabinet | corner cabinet, kitchen cabinet
upper cabinet: cabinet | wall cabinet, kitchen cabinet
small upper cabinet: cabinet | wall cabinet, kitchen cabinet
upper corner cabinet: cabinet | wall cabinet, kitchen cabinet
upper shelves cabinet: shelf | wall shelf, kitchen shelf, ~shelves
glass door cabinet: glass cabinet | display cabinet, glass door cabinet, ~cabinet
small oven: toaster oven | small oven, mini oven
small step ladder: step ladder | small ladder, step stool, ~ladder
smart car: car | small car, city car
socket: sock
sofa 2 seats: sofa | two-seat sofa, love seat
sofa 3 seats: sofa | three-seat sofa
spathiphyllum: peace lily | houseplant, flowering plant, ~potted plant, ~plant
spice tower: spice rack
stone grill device: grill | stone grill
stone lantern: stone lantern
sugar: sugar bowl
sushi tray: sushi
sycamore maple: maple tree | sycamore tree
table on trestles: trestle table
table tennis: ping pong table
table tennis bat: ping pong paddle
table with tablecloth: table | table with a tablecloth
tape: tape roll
technical table: drafting table
teck chair: chair | teak chair, wooden chair
text marker: marker
toilets unit: toilet
toilet paper dispenser: toilet paper
toilet brush: toilet brush | lavatory brush
toy train: toy train
tool: kitchen utensil | cooking utensil, spatula
trousers: pants
trunck: trunk
tv 16:9: television | widescreen tv
wall flat tv: television | wall tv, wall-mounted tv
tv: television
tv remote control: remote control
urinal: urinal
utensils pot: utensil holder
van: van
vertical shelves: shelves | tall shelves
vw new beetle: car | beetle car, small car
wall hanger: coat rack | wall coat rack, coat hook
wall lamp artwork: wall lamp
wall light: wall lamp
wall spotlight: spotlight
water cooler: water cooler
white board: whiteboard
white lily: lily | potted lily, flowering plant, ~plant, ~flower
winchester armchair: armchair | leather armchair, chesterfield armchair, club chair
winchester sofa: sofa | leather sofa, chesterfield sofa
window blind: window blind
window shutter: shutter
wire coathanger: clothes hanger | wire hanger
wireless phone: cordless phone | wireless phone
woman shoes: high heels
wood bank: bench | wooden bench
wood logs: logs
wood toy: toy | wooden toy
wooden alder table: table | wooden table, office table
wooden desk: desk | wooden desk
wooden table: table | wooden table
wooden teak table: table | wooden table, teak table
workbench: workbench
yamaha yzr r6: motorcycle | sports motorcycle, sport bike, racing motorcycle
yogurt bottle: bottle | yogurt bottle
yucca: yucca plant
BlendSwap-CC-0#1: chair | armchair, chair with armrests, office chair
BlendSwap-CC-0#71: box | ammo box, crate, metal box
BlendSwap-CC-0#31: chair | plastic chair
BlendSwap-CC-0#101: chair | antique chair, upholstered chair
BlendSwap-CC-0#143: chair | designer chair, modern chair
BlendSwap-CC-0#171: chair | bentwood chair, wooden chair, cafe chair
BlendSwap-CC-0#60: parasol
BlendSwap-CC-0#80: umbrella | folded umbrella, closed umbrella
BlendSwap-CC-BY#11: chair | cafe chair
BlendSwap-CC-BY#13: chair | cafe chair
BlendSwap-CC-BY#14: table | cafe table
BlendSwap-CC-BY#47: bamboo plant | lucky bamboo, ~potted plant, ~plant
BlendSwap-CC-BY#58: table | dining table, dinner table
BlendSwap-CC-BY#79: desk | office desk, office table
BlendSwap-CC-BY#114: radiator | modern radiator, towel radiator
BlendSwap-CC-BY#116: chair | plaid chair
BlendSwap-CC-BY#123: chair | kitchen chair
BlendSwap-CC-BY#120: armchair | lounge chair, leather lounge chair
KatorLegaz#51: chair | dining chair, wooden chair
KatorLegaz#55: shelves | utility shelves, metal shelves, storage rack
KatorLegaz#72: office chair
KatorLegaz#64: man | man in a suit, businessman
BlendSwap-CC-0#83: keypad | number lock, wall keypad
BlendSwap-CC-0#105: plastic crate
BlendSwap-CC-0#123: spring rider
BlendSwap-CC-BY#8: kettle
BlendSwap-CC-BY#21: paper cup
BlendSwap-CC-BY#37: sink | sink cabinet
BlendSwap-CC-BY#75: dresser | sideboard
BlendSwap-CC-BY#88: bicycle | child's bike, bmx bike
KatorLegaz#16: bench | garden bench
KatorLegaz#48: lounge chair | chaise longue, armchair with ottoman, ~armchair
KatorLegaz#86: grill | gas grill, propane grill, camping stove
Scopia#16: plate | serving plate, sushi plate
Scopia#27: display cabinet
Scopia#28: sideboard
Scopia#45: sideboard
Scopia#46: storage cabinet
Scopia#53: candle holder
Scopia#70: bowl of fruit | bowl of apples, apples
Scopia#108: soap dispenser
Scopia#171: swimming pool | kiddie pool, inflatable pool
Scopia#198: wood stove
Scopia#6: chair | garden chair, outdoor chair, patio chair
Scopia#10: table | garden table, outdoor table, patio table
Scopia#39: table | dining table, dinner table
Scopia#47: office chair
Scopia#61: table | wooden table, office table
Scopia#62: chair | metal chair, tubular chair
Scopia#63: lamp | table lamp
Scopia#81: office chair
Scopia#85: stool | kitchen stool
Scopia#92: chair | kitchen chair
Scopia#97: table | kitchen table
Scopia#86: sofa | leather sofa
Scopia#91: coffee table | wooden coffee table
Scopia#182: kick scooter
Scopia#352: bamboo | bamboo tree, bamboo plant, ~plant
"""

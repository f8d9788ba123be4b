"""Common words in captions of photographs. pretrain.py learns its vocabulary from them, so they take few tokens."""

WORDS = """
a an the of on in at to and with from by for over under behind beside between near next through into against around
is are was man woman men women boy girl child children baby person people couple group crowd friends family portrait
face hair eyes hand hands standing sitting walking running holding wearing looking smiling playing riding working
dog dogs cat cats bird birds horse horses cow sheep lion elephant bear deer fish butterfly bee insect animal animals
puppy kitten owl duck swan eagle fox rabbit squirrel monkey zebra giraffe turtle
flower flowers tree trees leaf leaves grass forest wood woods branch plant plants garden field meadow petals rose tulip
mountain mountains hill hills valley rock rocks cliff canyon desert sand dunes beach sea ocean waves wave water lake
river waterfall stream shore coast island sky cloud clouds sun sunset sunrise moon stars night day morning evening
light lights shadow shadows fog mist rain snow ice winter summer autumn spring fall storm rainbow landscape view
city street road path bridge building buildings house houses tower church window windows door wall roof stairs
skyline town village market shop cafe restaurant park square station train car cars truck bus bicycle bike motorcycle
boat boats ship airplane plane sign fence bench lamp
room table chair desk bed sofa kitchen floor book books laptop computer phone camera clock cup mug glass bottle bowl
plate coffee tea food bread fruit apple orange lemon strawberry cake pizza vegetables toy backpack bag hat shoe shoes
sneaker boot shirt dress jacket sunglasses umbrella guitar candle vase can teapot
red orange yellow green cyan blue purple pink white black grey silver gold golden brown dark bright colorful wooden
metal stone brick blurred background foreground close up seen front side top bottom left right center middle
large small big tall long old young new empty full wide narrow high low single two three four many few several
photo photograph photography picture image black-and-white aerial detail
""".split()

import re
_DROPPED = re.compile(
    r"\b(plug|switch|RJ45)\b|^Wall (double )?socket$|^Parking slot|^Pedestrian crossing$|^Arrow |^Concrete sidewalk$"
    r"|^Suit$|^Contemporary living room$|^Card game$"
)
def is_dropped(e): return bool(_DROPPED.search(e.name))
def describe(e):
    n=e.name.lower()
    return dict(key=e.key,name=e.name,noun=n,aliases=[],phrases={n:1.0},category=e.category,creator=e.creator,licence=e.licence,library=e.library)
def split_and_weight(ms):
    for m in ms: m['weight']=1.0; m['split']='train'

"""Maps of a linear's rows that low-rank factors cannot express (OFT, LoKr, ROAD and kin)."""

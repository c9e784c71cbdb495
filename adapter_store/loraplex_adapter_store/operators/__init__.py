"""Maps of a linear's rows that no pair of low-rank factors expresses (OFT, LoKr, ROAD and kin)."""

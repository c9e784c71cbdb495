"""Word lists that several demos draw from."""

from .task import Words

FIRST_NAMES = Words.parse(
    "Anna Ben Carla David Elena Felix Grace Henry Irene Jack Karen Liam Maria Noah Olivia "
    "Peter Quinn Rosa Samuel Tina Uma Victor Wendy Xavier Yara Zoe Adam Bella Chris Diana "
    "Eric Fiona George Hannah Ivan Julia Kevin Laura Mark Nina Oscar Paula Robert Sarah "
    "Thomas Vera Walter Amir Chen Fatima Hiro Ingrid Jorge Kofi Leila Mateo"
)
LAST_NAMES = Words.parse(
    "Miller Smith Garcia Chen Rossi Novak Olsen Dubois Fischer Kowalski Silva Tanaka Khan "
    "Brown Lopez Martin Jensen Weber Costa Moreau Larsen Becker Santos Ivanov Kim Patel "
    "Wilson Taylor Evans Murphy Schmidt Haas Lindgren Okafor Mensah Suzuki Ortiz Romano "
    "Bauer Hughes"
)
CITIES = Words.parse(
    "Oslo Paris Berlin Madrid Rome Vienna Lisbon Dublin Prague Warsaw Athens Helsinki "
    "Boston Chicago Denver Seattle Toronto Montreal Tokyo Osaka Seoul Delhi Mumbai Cairo "
    "Nairobi Lagos Sydney Melbourne Lima Bogota Munich Hamburg Milan Naples Zurich Geneva "
    "Brussels Krakow Budapest Istanbul"
)
JOBS = Words.parse(
    "teacher nurse engineer lawyer baker pilot farmer chemist painter plumber journalist "
    "architect dentist musician electrician carpenter librarian chef accountant "
    "photographer gardener mechanic translator surgeon designer"
)

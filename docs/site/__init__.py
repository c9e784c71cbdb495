"""Builds the documentation site: `make docs`.

``stage`` copies the pages and what they link to, ``reference`` writes the pages that the code
tells itself, ``finish`` takes out of the built pages what a strict content policy forbids. MkDocs
and its theme are configured by ``mkdocs.yml`` and know nothing of these steps.
"""

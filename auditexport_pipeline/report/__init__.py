"""Reports for people: one self-contained HTML page that says whether both databases agree, and how far behind the export is.

`figures` gathers the numbers, `verdict` says them in a sentence, `charts` and `tables` draw them, `page` puts them together.
Ids and counts only, no payload; whatever an application chose is escaped. The modules load pandas and matplotlib, so
import them only where somebody asked for a report.
"""

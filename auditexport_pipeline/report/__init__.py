"""Reports for people: one self-contained HTML page that says whether both databases agree, and how far behind the export is.

`figures` gathers the numbers, `charts` and `tables` draw them, `page` adds the verdict and writes the file. A page has ids and
counts, no payload; text that an application chose is escaped. The modules load pandas and matplotlib: import them only for
a report.
"""

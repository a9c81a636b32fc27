"""Pages for people: one self-contained HTML file that says whether both databases agree, and how far behind the export is.

What belongs here: gathering the numbers of a window (`gather`), saying them in a sentence (`verdict`), and how they look
(`page`, `tables`, `charts`, `look`). What does not: SQL (`report.source`), what is a discrepancy (`core.reconcile`), and
payloads: ids and counts only, and whatever an application chose is escaped. pandas and matplotlib are imported inside
functions, by whoever asked for a page.
"""

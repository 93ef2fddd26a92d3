"""Which layers a hybrid should leave their softmax attention: every layer of a teacher gets a score, hardest first.

`deltanet-convert TEACHER --rank METHOD -o ranking.json` calls `command.run`, and `--hybrid ranking.json:COUNT` reads
what it wrote. How well each method chooses: docs/results/ranking.md.
"""

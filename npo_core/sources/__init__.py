"""Where prompts come from: rows of the user's files (rows, columns), reasoning-gym (gym), and what becomes of them: a
training pool, a held-out set, and a report (load)."""

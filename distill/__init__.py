"""Student -> better student: recipes, data, losses, stages, and runs that can be stopped and resumed."""

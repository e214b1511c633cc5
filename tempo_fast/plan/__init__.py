"""``tempo-fast plan``: memory, time and cost of a recipe from its model's config.json, before anything is started."""

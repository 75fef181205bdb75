# Shortcuts for people; CI and pre-commit run the same commands.
.PHONY: check test slow docs

check: ## format, lint, types
	.ci/check

test: ## what the README names: minutes
	uv run pytest

slow: ## the rest of the tests
	uv run pytest -m slow

docs: ## the documentation into site/
	uv run mkdocs build --strict

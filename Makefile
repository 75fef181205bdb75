# Shortcuts for people; CI and pre-commit run the same commands.
.PHONY: check test slow docs sbom audit

check: ## format, lint, types
	.ci/check

test: ## what the README names: minutes
	uv run pytest

slow: ## the rest of the tests
	uv run pytest -m slow

docs: ## the documentation into site/
	uv run mkdocs build --strict

sbom: ## what is shipped and all that it needs, with versions and hashes: sbom.json (CycloneDX), from uv.lock alone
	uv export --frozen --no-dev --all-extras --format cyclonedx1.5 --output-file sbom.json >/dev/null

audit: ## known vulnerabilities in uv.lock; asks osv.dev
	uv audit --frozen

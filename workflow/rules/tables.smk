# Evaluations -> tables and figures: no audio, features, checkpoints or torch.
PAPER_TABLES = [f"table{number}" for number in sorted(CONFIG.tables.numbers)]
RUN_TABLES = ["claims", "effects", "per_fold", "per_session", "confusion"] + ["clusters"] * bool(GMPS)
RUN_TABLES += ["ablations"] * bool(CONFIG.ablations)


rule tables:
    input:
        corpus=rules.corpus.output.summary,
        evaluations=evaluated(),
    output:
        expand("<results>/tables/{table}.{suffix}", table=PAPER_TABLES + RUN_TABLES, suffix=["csv", "md", "html"]),
        expand("<results>/tables/{table}.tex", table=PAPER_TABLES),
        provenance="<logs>/tables.json",
    log:
        "<logs>/tables.log",
    localrule: True
    conda:
        "../../envs/tables.yaml"
    params:
        config=settings("tables"),
        evaluations=subpath(input.corpus, parent=True),
        folder=subpath(output[0], parent=True),
        code=code_hash("tables"),
    shell:
        "python -m gmp_atl tables --config {params.config:q} --evaluations {params.evaluations}"
        " --output {params.folder} --provenance {output.provenance} 2> {log}"


rule figures:
    input:
        corpus=rules.corpus.output.summary,
        evaluations=evaluated(),
    output:
        layers="<results>/figures/table4.svg",
        confusion="<results>/figures/confusion.svg",
        provenance="<logs>/figures.json",
    log:
        "<logs>/figures.log",
    localrule: True
    conda:
        "../../envs/tables.yaml"
    params:
        config=settings("tables"),
        evaluations=subpath(input.corpus, parent=True),
        folder=subpath(output.layers, parent=True),
        code=code_hash("figures"),
    shell:
        "python -m gmp_atl figures --config {params.config:q} --evaluations {params.evaluations}"
        " --output {params.folder} --provenance {output.provenance} 2> {log}"


# What tables need, in one file for machines without audio, models or GPU. Not part of a run: `snakemake archive`.
rule archive:
    input:
        corpus=rules.corpus.output.summary,
        evaluations=evaluated(),
        table=rules.tables.output[0],
        figure=rules.figures.output.layers,
    output:
        archive=f"<results>/{CONFIG.name}.zip",
        provenance="<logs>/archive.json",
    log:
        "<logs>/archive.log",
    conda:
        "../../envs/tables.yaml"
    params:
        config=settings("tables"),
        evaluations=subpath(input.corpus, parent=True),
        tables=subpath(input.table, parent=True),
        figures=subpath(input.figure, parent=True),
        code=code_hash("archive"),
    shell:
        "python -m gmp_atl archive --config {params.config:q} --evaluations {params.evaluations}"
        " --tables {params.tables} --figures {params.figures} --output {output.archive}"
        " --provenance {output.provenance} 2> {log}"

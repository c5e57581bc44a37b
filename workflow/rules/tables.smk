# Evaluations -> tables, figures and report: no audio, features, checkpoints or torch.
PAPER_TABLES = [f"table{number}" for number in sorted(CONFIG.tables.numbers)]
RUN_TABLES = ["claims", "effects", "per_fold", "per_session", "confusion", "provenance"]
RUN_TABLES += ["clusters"] * bool(GMPS) + ["ablations"] * bool(CONFIG.ablations)
FIGURES = ["table4", "scores", "folds", "confusions", "training", "clusters", "jobs", "embeddings", "utterances"]


rule tables:
    input:
        corpus=rules.corpus.output.summary,
        evaluations=evaluated(),
    output:
        [page("tables", name, "html") for name in PAPER_TABLES + RUN_TABLES],
        expand("<results>/tables/{table}.{suffix}", table=PAPER_TABLES + RUN_TABLES, suffix=["csv", "md"]),
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
        utterances=illustrated(),
    output:
        [page("figures", name, "svg") for name in FIGURES],
        provenance="<logs>/figures.json",
    log:
        "<logs>/figures.log",
    localrule: True
    conda:
        "../../envs/tables.yaml"
    params:
        config=settings("tables"),
        evaluations=subpath(input.corpus, parent=True),
        folder=subpath(output[0], parent=True),
        code=code_hash("figures"),
    shell:
        "python -m gmp_atl figures --config {params.config:q} --evaluations {params.evaluations}"
        " --output {params.folder} --provenance {output.provenance} 2> {log}"


# What tables need, in one file for machines without audio, models or GPU. Not part of a run: `make archive`.
rule archive:
    input:
        corpus=rules.corpus.output.summary,
        evaluations=evaluated(),
        utterances=illustrated(),
        tables=[path for path in rules.tables.output if path != rules.tables.output.provenance],
        figures=[path for path in rules.figures.output if path != rules.figures.output.provenance],
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
        code=code_hash("archive"),
    shell:
        "python -m gmp_atl archive --config {params.config:q} --evaluations {params.evaluations}"
        " --tables {input.tables} --figures {input.figures} --output {output.archive}"
        " --provenance {output.provenance} 2> {log}"

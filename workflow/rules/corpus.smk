# Release on disk -> utterance table. Every clip is decoded here: a damaged one is found before hours of training.
rule synthesis:
    output:
        index="<results>/release/index.csv",
        provenance="<provenance>/synthesis.json",
    log:
        "<logs>/synthesis.log",
    conda:
        "../../envs/corpus.yaml"
    params:
        code=code_hash("synthesis"),
    shell:
        "python -m gmp_atl synthesis --output {output.index} --provenance {output.provenance} 2> {log}"


rule corpus:
    input:
        release=index_of_release,
    output:
        utterances="<results>/corpus/utterances.parquet",
        excluded="<results>/corpus/excluded.parquet",
        root="<results>/corpus/root.txt",
        summary="<results>/evaluations/corpus.parquet",
        provenance="<provenance>/corpus.json",
    log:
        "<logs>/corpus.log",
    conda:
        "../../envs/corpus.yaml"
    threads: CONFIG.compute.threads
    params:
        config=settings("corpus"),
        root=lambda _: CORPUS_ROOT,
        release=lambda _: release(),
        code=code_hash("corpus"),
    shell:
        "python -m gmp_atl corpus --config {params.config:q} --root {params.root:q} --threads {threads}"
        " --utterances {output.utterances} --excluded {output.excluded} --summary {output.summary}"
        " --provenance {output.provenance} 2> {log}; printf '%s\\n' {params.release:q} > {output.root}"

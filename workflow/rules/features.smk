# The pre-trained HuBERT, and its convolutions' output: once per corpus, for every fold, seed and stage.
rule pretrained:
    output:
        config="<results>/pretrained/config.json",
        encoder="<results>/pretrained/model.safetensors",
        provenance="<provenance>/pretrained.json",
    log:
        "<logs>/pretrained.log",
    localrule: True
    conda:
        "../../envs/torch.yaml"
    resources:
        mem_mb=4_000,
        runtime=60,
    params:
        config=settings("pretrained"),
        folder=subpath(output.encoder, parent=True),
        code=code_hash("pretrained"),
    shell:
        "python -m gmp_atl pretrained --config {params.config:q} --output {params.folder}"
        " --provenance {output.provenance} 2> {log}"


rule local_features:
    input:
        utterances=rules.corpus.output.utterances,
        encoder=rules.pretrained.output.encoder,
    output:
        features="<results>/local_features.parquet",
        provenance="<provenance>/local_features.json",
    log:
        "<logs>/local_features.log",
    benchmark:
        "<benchmarks>/local_features.tsv"
    conda:
        "../../envs/torch.yaml"
    threads: CONFIG.compute.threads
    resources:
        gpu=1,
        mem_mb=8_000,
        runtime=60,
    params:
        config=settings("local_features"),
        audio_root=lambda _: AUDIO_ROOT,
        encoder=subpath(input.encoder, parent=True),
        code=code_hash("local_features"),
    shell:
        "python -m gmp_atl local_features --config {params.config:q} --threads {threads} --gpus {resources.gpu}"
        " --utterances {input.utterances} --audio-root {params.audio_root:q} --encoder {params.encoder}"
        " --output {output.features} --provenance {output.provenance} 2> {log}"

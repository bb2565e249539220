"""Measures serving as a client sees it: plain vLLM, vLLM's own alternatives and SEDAC's tiers side by side, over HTTP or in process.

    matrix      what is measured; reading reads it from YAML
    prompts     what is asked
    servers     processes that are started, frozen, thawed and stopped
    load        requests over HTTP, and what came back when
    rounds      the order of the measurements
    cells       what is measured already, kept in a file
    results     figures of every row beside those of plain vLLM
    report      table, picture and page

Called by `sedac bench`. It never changes a server that it did not start.
"""

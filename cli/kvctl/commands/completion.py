"""`kvctl completion`: print the script that completes kvctl's commands in a shell."""

from __future__ import annotations

import argparse

from kvctl.exit_codes import ExitCode
from kvctl.output import print_json, write

_BASH = """\
# kvctl completion for bash: source <(kvctl completion bash)
_kvctl() {
    local IFS=$'\\n'
    COMPREPLY=($(compgen -W "$(kvctl --complete -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)" \\
        -- "${COMP_WORDS[COMP_CWORD]}"))
}
complete -o default -F _kvctl kvctl
"""
_ZSH = """\
#compdef kvctl
# kvctl completion for zsh: source <(kvctl completion zsh)
_kvctl() {
    local -a found
    found=("${(@f)$(kvctl --complete -- "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    compadd -- $found
}
compdef _kvctl kvctl
"""
_FISH = """\
# kvctl completion for fish: kvctl completion fish | source
function __kvctl_words
    set -l words (commandline -opc) (commandline -ct)
    kvctl --complete -- $words[2..-1] 2>/dev/null
end
complete -c kvctl -f -a '(__kvctl_words)'
"""
SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def run_completion(arguments: argparse.Namespace) -> ExitCode:
    """Print the completion script of the named shell."""
    script = SCRIPTS[arguments.shell]
    if arguments.json:
        print_json({"shell": arguments.shell, "script": script})
    else:
        write(script)
    return ExitCode.OK

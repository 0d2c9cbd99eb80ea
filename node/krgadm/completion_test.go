package krgadm

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestCompletion lets bash complete lines; "|" is where the cursor is.
func TestCompletion(t *testing.T) {
	bash, err := exec.LookPath("bash")
	if err != nil {
		t.Skip("no bash")
	}
	dir := t.TempDir()
	script := filepath.Join(dir, "krgadm.bash")
	fake := "#!/bin/sh\nprintf '1:online\\n2:online\\n3:present\\n31:present\\n'\n"
	if err := os.WriteFile(script, Completion, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "krgadm"), []byte(fake), 0o755); err != nil {
		t.Fatal(err)
	}
	for line, want := range map[string]string{
		"krgadm ":                       "cluster nodes --help --version",
		"krgadm no":                     "nodes",
		"krgadm cluster ":               "status poweroff reboot --json",
		"krgadm nodes ":                 "status add del --json",
		"krgadm nodes a":                "add",
		"krgadm nodes add --c":          "--count",
		"krgadm nodes del --t":          "--total",
		"krgadm nodes add -n ":          "3 31",
		"krgadm nodes del --nodes ":     "1 2",
		"krgadm nodes status -n ":       "1 2 3 31",
		"krgadm nodes add -n 2,3":       "2,3 2,31",
		"krgadm nodes add -n 1-":        "1-3 1-31",
		"krgadm nodes add --count ":     "",
		"krgadm nodes status --nodes 2": "2",
	} {
		words := strings.Split(line, " ")
		quoted := ""
		for _, w := range words {
			quoted += fmt.Sprintf(" '%s'", w)
		}
		cmd := exec.Command(bash, "--norc", "-c", fmt.Sprintf(`. "%s"; COMP_WORDS=(%s); COMP_CWORD=%d; _krgadm; echo "${COMPREPLY[*]}"`, script, quoted, len(words)-1))
		cmd.Env = []string{"PATH=" + dir + ":/usr/bin:/bin"}
		out, err := cmd.CombinedOutput()
		if err != nil || strings.TrimSpace(string(out)) != want {
			t.Errorf("%q: %q, %v; want %q", line, out, err, want)
		}
	}
}

package kerrighed

import (
	"slices"
	"strings"
	"testing"

	"krgimage/configs/version"
)

// TestTable holds the table against the install list of Kerrighed's Makefiles.
func TestTable(t *testing.T) {
	want := map[string][]string{
		"bin":  {"checkpoint", "ipccheckpoint", "ipcrestart", "krgcapset", "krgcr-run", "migrate", "restart"},
		"sbin": {"krg_legacy_scheduler", "krg_rbt_scheduler", "krgadm", "krgboot", "krgboot_helper", "krginit", "krginit_helper", "krglog"},
	}
	got := map[string][]string{}
	for _, tool := range Tools() {
		got[tool.Dir] = append(got[tool.Dir], tool.Name)
		if tool.About == "" || (tool.Service == "") != (tool.run != nil) {
			t.Errorf("%s: no text", tool.Name)
		}
	}
	for dir, names := range want {
		if !slices.Equal(got[dir], names) {
			t.Errorf("%s: %q, want %q", dir, got[dir], names)
		}
	}
	if len(got) != len(want) {
		t.Errorf("directories %v", got)
	}
	if _, ok := Find("krg"); ok {
		t.Error("krg itself is in the table")
	}
}

func TestRun(t *testing.T) {
	block := " " + version.Version + "\nPart of krgimage, a single-system-image cluster with the commands of Kerrighed.\n"
	for _, tc := range []struct {
		line        string
		status      int
		out, errOut string // out is a prefix
	}{
		{"migrate 100 2", 1, "", "migrate: this release of krgimage doesn't have this service: process migration\n"},
		{"migrate", 1, "", "migrate: this release of krgimage doesn't have this service: process migration\n"},
		{"migrate --version", 0, "migrate" + block, ""},
		{"migrate -v", 0, "migrate" + block, ""},
		{"migrate -h", 0, "Usage: migrate [-h|--help] [-v|--version] PID NODEID\n\nMove a process to another node.\n", ""},
		{"krgadm --help", 0, "Usage: krgadm [-h|--help] [--version]\n  or:  krgadm cluster ", ""},
		{"krgadm --version", 0, "krgadm" + block, ""},
		{"checkpoint --version", 0, "checkpoint" + block, ""},
		{"krgboot_helper --help", 0, "Usage: krgboot_helper\n", ""},
	} {
		f := strings.Fields(tc.line)
		tool, ok := Find(f[0])
		if !ok {
			t.Fatalf("no %s", f[0])
		}
		var out, errOut strings.Builder
		if got := tool.Run(t.Context(), f[1:], &out, &errOut); got != tc.status {
			t.Errorf("%s: status %d, want %d", tc.line, got, tc.status)
		}
		if !strings.HasPrefix(out.String(), tc.out) || tc.out == "" && out.Len() > 0 || errOut.String() != tc.errOut {
			t.Errorf("%s:\nstdout %q\nstderr %q", tc.line, out.String(), errOut.String())
		}
	}
}

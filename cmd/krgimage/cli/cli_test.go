package cli

import (
	"bytes"
	"context"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"
)

var update = flag.Bool("update", false, "write the golden files anew")

// krgimage runs the program in process, in a directory of its own.
func krgimage(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = Run(t.Context(), Streams{In: strings.NewReader(""), Out: &out, Err: &errs}, args)
	return code, out.String(), errs.String()
}

// TestGoldenHelp holds the help of every command against testdata/help.txt: a
// change of a command's face is seen in review.
func TestGoldenHelp(t *testing.T) {
	var all strings.Builder
	var visit func(cmd *cobra.Command)
	visit = func(cmd *cobra.Command) {
		if cmd.Hidden || cmd.Name() == "help" {
			return
		}
		args := append(strings.Fields(cmd.CommandPath())[1:], "--help")
		code, out, errs := krgimage(t, args...)
		if code != 0 || errs != "" {
			t.Errorf("%s: exit code %d, %s", cmd.CommandPath(), code, errs)
		}
		if cmd.Short == "" {
			t.Errorf("%s has no short description", cmd.CommandPath())
		}
		all.WriteString("$ krgimage " + strings.Join(args, " ") + "\n" + out + "\n")
		if cmd.Name() == "completion" {
			return // cobra's own
		}
		for _, sub := range cmd.Commands() {
			visit(sub)
		}
	}
	root := New(Streams{})
	root.InitDefaultCompletionCmd()
	visit(root)

	file := filepath.Join("testdata", "help.txt")
	if *update {
		if err := os.WriteFile(file, []byte(all.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), all.String()); diff != "" {
		t.Errorf("help texts changed (go test -update writes them anew):\n%s", diff)
	}
}

func TestErrors(t *testing.T) {
	t.Chdir(t.TempDir())
	if err := os.WriteFile("bad.yaml", []byte("sesion_id: 1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile("good.yaml", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name string
		args []string
		code int
		want string // in the message
	}{
		{"unknown command", []string{"bulid"}, 2, "did you mean build?"},
		{"unknown flag", []string{"build", "--fast"}, 2, "'krgimage build --help'"},
		{"extra argument", []string{"build", "kernel"}, 2, `got "kernel"`},
		{"no configuration", []string{"build"}, 1, "krgimage init"},
		{"bad configuration", []string{"build", "-c", "bad.yaml"}, 1, "bad.yaml:1:1"},
		{"hint", []string{"config", "check", "-c", "bad.yaml"}, 1, "session_id"},
		{"unknown part", []string{"build", "-c", "good.yaml", "--rebuild", "kernal"}, 1, "kernal"},
		{"no head", []string{"nodes", "-c", "good.yaml"}, 1, "krgimage serve"},
		{"ssh without a cluster", []string{"ssh", "-c", "good.yaml"}, 1, "krgimage serve"},
		{"ssh to two nodes", []string{"ssh", "1", "2"}, 2, "one node at a time"},
		{"too many nodes", []string{"trial", "-c", "good.yaml", "--nodes", "999"}, 2, "1 to"},
		{"memory without sense", []string{"trial", "-c", "good.yaml", "--memory", "much"}, 2, "--memory"},
		{"stop without a trial", []string{"trial", "stop", "-c", "good.yaml"}, 1, "no trial is running"},
		{"status without a trial", []string{"trial", "status", "-c", "good.yaml"}, 1, "no trial is running"},
		{"console of no node", []string{"trial", "console", "one", "-c", "good.yaml"}, 2, "no node id"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if strings.HasPrefix(tt.args[0], "trial") && len(tt.args) > 3 && strings.HasPrefix(tt.args[3], "--") && os.Geteuid() != 0 {
				t.Skip("a trial asks for root first")
			}
			code, out, errs := krgimage(t, tt.args...)
			if code != tt.code || !strings.Contains(errs, tt.want) {
				t.Errorf("exit code %d, message %q; want %d and %q", code, errs, tt.code, tt.want)
			}
			if out != "" {
				t.Errorf("an error printed to the output: %q", out)
			}
		})
	}
}

func TestInitWritesOnce(t *testing.T) {
	t.Chdir(t.TempDir())
	if code, _, errs := krgimage(t, "init"); code != 0 {
		t.Fatal(errs)
	}
	if err := os.WriteFile("cluster.yaml", []byte("name: mine\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	code, _, errs := krgimage(t, "init")
	data, err := os.ReadFile("cluster.yaml")
	if code != 1 || !strings.Contains(errs, "left as it is") || err != nil || string(data) != "name: mine\n" {
		t.Errorf("init over a file: exit code %d, %q, file %q, %v", code, errs, data, err)
	}
	if code, out, errs := krgimage(t, "config", "show"); code != 0 || !strings.Contains(out, "name: mine") || !strings.Contains(out, "session_id: 1") {
		t.Errorf("config show: %d %q %q", code, out, errs)
	}
	if code, out, errs := krgimage(t, "config", "show", "--json"); code != 0 || !strings.Contains(out, `"session_id": 1`) {
		t.Errorf("config show --json: %d %q %q", code, out, errs)
	}
}

func TestManPages(t *testing.T) {
	dir := t.TempDir()
	if code, _, errs := krgimage(t, "man", "--dir", dir); code != 0 {
		t.Fatal(errs)
	}
	page, err := os.ReadFile(filepath.Join(dir, "krgimage-build.1"))
	if err != nil || !strings.Contains(string(page), "SOURCE_DATE_EPOCH") {
		t.Errorf("krgimage-build.1: %v\n%s", err, page)
	}
}

func TestClientKeyIsKept(t *testing.T) {
	state := t.TempDir()
	_, first, err := clientKey(state)
	if err != nil {
		t.Fatal(err)
	}
	file, second, err := clientKey(state)
	if err != nil || first != second {
		t.Errorf("the key changed: %q, %q, %v", first, second, err)
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("key file: %v, %v", info.Mode(), err)
	}
	if err := os.WriteFile(file, []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := clientKey(state); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("a damaged key: %v", err)
	}
}

func TestPrefixWriter(t *testing.T) {
	var out bytes.Buffer
	w := &prefixWriter{mu: &sync.Mutex{}, out: &out, prefix: "krg-1| "}
	for _, piece := range []string{"one\r\ntw", "o\nthree"} {
		if _, err := w.Write([]byte(piece)); err != nil {
			t.Fatal(err)
		}
	}
	if got, want := out.String(), "krg-1| one\nkrg-1| two\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestInterruptedCommandEndsCleanly(t *testing.T) {
	t.Chdir(t.TempDir())
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := os.WriteFile("cluster.yaml", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	var out, errs bytes.Buffer
	if code := Run(ctx, Streams{In: strings.NewReader(""), Out: &out, Err: &errs}, []string{"build"}); code != 1 {
		t.Errorf("exit code %d, %s", code, errs.String())
	}
	if !strings.Contains(errs.String(), "cancel") && !strings.Contains(errs.String(), "interrupt") {
		t.Errorf("an interrupted build says %q", errs.String())
	}
}

package rescue

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"testing"
)

func TestHint(t *testing.T) {
	base := errors.New("no root")
	err := fmt.Errorf("boot: %w", Hint(base, "serve %s", "it"))
	if !errors.Is(err, base) || HintOf(err) != "serve it" || err.Error() != "boot: no root" {
		t.Errorf("err %q, hint %q", err, HintOf(err))
	}
	if Hint(nil, "x") != nil || HintOf(base) != "" {
		t.Error("hint out of nothing")
	}
}

func TestGuard(t *testing.T) {
	var none []int
	err := Guard(func() error { none[3] = 1; return nil })
	if err == nil || !strings.Contains(err.Error(), "index out of range") || !strings.Contains(err.Error(), "rescue_test.go") {
		t.Errorf("err = %v, want the panic with its stack", err)
	}
	if err := Guard(func() error { return nil }); err != nil {
		t.Error(err)
	}
}

// terminal is one opening of a console: text typed on it, and a screen.
type terminal struct {
	io.Reader
	io.Writer
}

func (terminal) Close() error { return nil }

// terminals returns an opener whose successive terminals get one text of input
// each.
func terminals(screen io.Writer, typed ...string) opener {
	n := 0
	return func() (io.ReadWriteCloser, error) {
		if n == len(typed) {
			return nil, errors.New("no terminal")
		}
		n++
		return terminal{strings.NewReader(typed[n-1]), screen}, nil
	}
}

func TestConsole(t *testing.T) {
	problem := Hint(errors.New("the root has no krg"), "run krgimage build")
	for _, tc := range []struct {
		name   string
		shell  string
		lines  []string
		want   Action
		shells int
	}{
		{"reboot", "/bin/gosh", []string{"r\n"}, Reboot, 0},
		{"power off after nonsense", "/bin/gosh", []string{"help\nP\n"}, Poweroff, 0},
		{"two shells on terminals opened anew", "/bin/gosh", []string{"\n", "\n", "r\n"}, Reboot, 2},
		{"no shell to be had", "", []string{"\n\np\n"}, Poweroff, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var shells int
			var screen strings.Builder
			o := Options{Problem: problem, Shell: tc.shell, Run: func(cmd *exec.Cmd) error {
				if cmd.Path != tc.shell || cmd.Stdin == nil {
					t.Errorf("shell command %v", cmd)
				}
				shells++
				return nil
			}}
			gone := func() (io.ReadWriteCloser, error) { return nil, errors.New("no such console") }
			got, err := serve(context.Background(), o, []opener{gone, terminals(&screen, tc.lines...)})
			if err != nil || got != tc.want || shells != tc.shells {
				t.Errorf("action %v, %v; %d shells", got, err, shells)
			}
			for _, text := range []string{"the root has no krg", "What to do: run krgimage build", "[r] reboot"} {
				if !strings.Contains(screen.String(), text) {
					t.Errorf("screen lacks %q:\n%s", text, screen.String())
				}
			}
			if strings.Contains(screen.String(), "[Enter]") != (tc.shell != "") {
				t.Errorf("screen offers the wrong things:\n%s", screen.String())
			}
		})
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := serve(ctx, Options{Problem: problem}, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("without terminals: %v", err)
	}
}

// Package rescue is the end of the line for a node that can't boot: instead of
// a kernel panic its consoles say what is wrong and what to do, and offer a
// shell, a reboot or a power-off to whoever sits there. The network never
// leads here.
package rescue

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"krgimage/node/bootlog"
)

// hinted is an error that knows what to do about it.
type hinted struct {
	error
	hint string
}

func (h hinted) Unwrap() error { return h.error }

// Hint adds to err what a person at the console or the head should do.
func Hint(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	return hinted{err, fmt.Sprintf(format, args...)}
}

// HintOf returns the hint of err, or "".
func HintOf(err error) string {
	var h hinted
	if errors.As(err, &h) {
		return h.hint
	}
	return ""
}

// Guard runs f and turns a panic into an error with its stack: a PID 1 that
// dies takes the kernel with it.
func Guard(f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("internal error: %v\n%s", p, debug.Stack())
		}
	}()
	return f()
}

// Action is what the person at the console chose.
type Action int

// The choices besides the shell, after which the console goes on.
const (
	Reboot Action = iota
	Poweroff
)

// Options of a rescue console.
type Options struct {
	Problem error
	Shell   string // program to run for Enter; empty: no shell is offered
	// Run runs a command to its end; nil means cmd.Run. PID 1 passes one that
	// gets along with its reaper.
	Run func(cmd *exec.Cmd) error
}

// shells lists where a shell may be, the initramfs's first.
var shells = []string{"/bbin/gosh", "/bin/gosh", "/bin/bash", "/bin/sh"}

// FindShell returns the first shell that exists, or "".
func FindShell() string {
	for _, s := range shells {
		if fi, err := os.Stat(s); err == nil && fi.Mode().IsRegular() {
			return s
		}
	}
	return ""
}

// opener opens a terminal anew.
type opener func() (io.ReadWriteCloser, error)

// Console offers the choices on all consoles and returns the first that was
// made. It ends without a choice only when ctx does.
func Console(ctx context.Context, o Options) (Action, error) {
	var ttys []opener
	for _, name := range bootlog.Devices() {
		ttys = append(ttys, func() (io.ReadWriteCloser, error) {
			f, err := os.OpenFile(name, os.O_RDWR|unix.O_NOCTTY, 0)
			if err != nil {
				return nil, err
			}
			sane(f)
			return f, nil
		})
	}
	return serve(ctx, o, ttys)
}

// serve is Console over any terminals. The readers of terminals where nobody
// chose stay blocked; the node is about to go down.
func serve(ctx context.Context, o Options, ttys []opener) (Action, error) {
	if o.Run == nil {
		o.Run = (*exec.Cmd).Run
	}
	chosen := make(chan Action, len(ttys))
	var shell sync.Mutex // one shell at a time
	for _, open := range ttys {
		go func() {
			if a, ok := talk(o, open, &shell); ok {
				chosen <- a
			}
		}()
	}
	select {
	case a := <-chosen:
		return a, nil
	case <-ctx.Done():
		return Reboot, ctx.Err()
	}
}

// talk asks on one terminal until something is chosen; false means that the
// terminal went away. The terminal is opened again after a shell: the kernel
// hangs it up for everyone when the shell, its session's leader, ends.
func talk(o Options, open opener, shell *sync.Mutex) (Action, bool) {
	for {
		tty, err := open()
		if err != nil {
			return 0, false
		}
		fmt.Fprint(tty, banner(o))
		action, wantsShell, err := choose(o, tty)
		if err != nil {
			tty.Close()
			return 0, false
		}
		if !wantsShell {
			tty.Close()
			return action, true
		}
		shell.Lock()
		err = o.Run(shellCommand(o.Shell, tty))
		shell.Unlock()
		tty.Close()
		if err != nil {
			if tty, openErr := open(); openErr == nil {
				fmt.Fprintf(tty, "%s: %v\n", o.Shell, err)
				tty.Close()
			}
		}
	}
}

// choose reads lines until one is a choice.
func choose(o Options, tty io.ReadWriter) (a Action, wantsShell bool, err error) {
	in := bufio.NewReader(tty)
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			return 0, false, err
		}
		switch strings.ToLower(strings.TrimSpace(line)) {
		case "r", "reboot", "retry":
			return Reboot, false, nil
		case "p", "poweroff":
			return Poweroff, false, nil
		case "":
			if o.Shell != "" {
				return 0, true, nil
			}
		}
		fmt.Fprint(tty, choices(o))
	}
}

func banner(o Options) string {
	var b strings.Builder
	b.WriteString("\n*** This node can't go on booting. ***\n\n")
	for line := range strings.Lines(o.Problem.Error()) {
		b.WriteString("  " + strings.TrimRight(line, "\n") + "\n")
	}
	if hint := HintOf(o.Problem); hint != "" {
		b.WriteString("\n  What to do: " + hint + "\n")
	}
	return b.String() + "\n" + choices(o)
}

func choices(o Options) string {
	s := "  [r] reboot and try again   [p] power off"
	if o.Shell != "" {
		s = "  [Enter] shell " + s
	}
	return s + "   (then Enter): "
}

func shellCommand(shell string, tty io.ReadWriter) *exec.Cmd {
	cmd := exec.Command(shell)
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/bbin:/bin:/ubin:/usr/sbin:/usr/bin:/sbin", "HOME=/", "TERM=linux", "PS1=rescue# "}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
	if _, ok := tty.(*os.File); ok {
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	}
	return cmd
}

// sane gives a terminal line editing and echo, whatever ran on it before.
func sane(f *os.File) {
	t, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err != nil {
		return
	}
	t.Iflag |= unix.ICRNL | unix.BRKINT
	t.Oflag |= unix.OPOST | unix.ONLCR
	t.Lflag |= unix.ICANON | unix.ECHO | unix.ECHOE | unix.ECHOK | unix.ISIG | unix.IEXTEN
	_ = unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, t)
}

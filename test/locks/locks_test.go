// Package locks puts the Linux kernel's lock manager to work against ours:
// flock and fcntl locks between two clients, through crashes of all of them.
package locks

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"krgimage/nfsroot/nfs"
	"krgimage/test/uml"
)

func TestMain(m *testing.M) {
	os.Exit(uml.Main(m, map[string]uml.Program{"lock": lockProgram}))
}

// lockProgram takes locks one after the other and keeps them until it is killed:
//
//	lock FILE KIND MODE WAIT START LENGTH [FILE KIND ...]
//
// KIND is flock, fcntl or ofd, MODE ex, sh or un, WAIT wait or try. It says
// what came of each.
func lockProgram(args []string) int {
	for ; len(args) >= 6; args = args[6:] {
		fd, err := unix.Open(args[0], unix.O_RDWR|unix.O_CREAT, 0o666)
		if err != nil {
			fmt.Println("open:", err)
			return 1
		}
		if err := take(fd, args[1], args[2], args[3] == "wait", args[4], args[5]); err != nil {
			var errno unix.Errno
			errors.As(err, &errno)
			fmt.Println(unix.ErrnoName(errno))
			return 0
		}
		fmt.Println("done")
	}
	for {
		_ = unix.Pause()
	}
}

func take(fd int, kind, mode string, wait bool, start, length string) error {
	from, _ := strconv.ParseInt(start, 10, 64)
	n, _ := strconv.ParseInt(length, 10, 64)
	if kind == "flock" {
		how := map[string]int{"ex": unix.LOCK_EX, "sh": unix.LOCK_SH, "un": unix.LOCK_UN}[mode]
		if !wait {
			how |= unix.LOCK_NB
		}
		return again(func() error { return unix.Flock(fd, how) })
	}
	l := unix.Flock_t{Type: map[string]int16{"ex": unix.F_WRLCK, "sh": unix.F_RDLCK, "un": unix.F_UNLCK}[mode], Start: from, Len: n}
	cmd := map[string]int{"fcntltrue": unix.F_SETLKW, "fcntlfalse": unix.F_SETLK, "ofdtrue": unix.F_OFD_SETLKW, "ofdfalse": unix.F_OFD_SETLK}[kind+strconv.FormatBool(wait)]
	return again(func() error { return unix.FcntlFlock(uintptr(fd), cmd, &l) })
}

func again(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// holder is a lockProgram under way in a guest.
type holder struct {
	t    *testing.T
	mu   sync.Mutex
	out  bytes.Buffer
	news chan struct{}
	kill context.CancelFunc
	end  chan struct{}
}

func (h *holder) Write(p []byte) (int, error) {
	h.mu.Lock()
	h.out.Write(p)
	h.mu.Unlock()
	select {
	case h.news <- struct{}{}:
	default:
	}
	return len(p), nil
}

func (h *holder) said() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return strings.TrimSpace(h.out.String())
}

// start runs lock with the words of a line.
func start(t *testing.T, g *uml.Guest, line string) *holder {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	h := &holder{t: t, news: make(chan struct{}, 1), kill: cancel, end: make(chan struct{})}
	go func() {
		defer close(h.end)
		if err := g.Stream(ctx, uml.Call("lock", strings.Fields(line)...), h); err != nil && ctx.Err() == nil {
			fmt.Fprintf(h, "(%v)\n", err)
		}
	}()
	return h
}

const patience = 3 * time.Minute

// says waits until it has said that.
func (h *holder) says(want string) {
	h.t.Helper()
	deadline := time.After(patience)
	for h.said() != want {
		if len(h.said()) > len(want) {
			h.t.Fatalf("it said %q, want %q", h.said(), want)
		}
		select {
		case <-h.news:
		case <-deadline:
			h.t.Fatalf("it said %q, want %q", h.said(), want)
		}
	}
}

// stop kills the process; its locks go with it.
func (h *holder) stop() { h.kill(); <-h.end }

// ask tries and gives up what it got.
func ask(t *testing.T, g *uml.Guest, line, want string) {
	t.Helper()
	h := start(t, g, line)
	h.says(want)
	h.stop()
}

func TestLocks(t *testing.T) {
	uml.Need(t)
	n := uml.NewNet(t)
	server := n.StartServer(t, t.TempDir(), nfs.Export{Path: "/", Dir: t.TempDir()})
	guests := n.BootAll(t, "one", "two")
	one, two := guests[0], guests[1]
	for _, g := range guests {
		g.MountLocked(t, uml.Port, "/", "/mnt/r")
	}

	t.Run("each kind excludes", func(t *testing.T) {
		for _, kind := range []string{"flock", "fcntl", "ofd"} {
			h := start(t, one, "/mnt/r/"+kind+" "+kind+" ex try 0 0")
			h.says("done")
			ask(t, two, "/mnt/r/"+kind+" "+kind+" ex try 0 0", "EAGAIN")
			ask(t, two, "/mnt/r/"+kind+" "+kind+" sh try 0 0", "EAGAIN")
			h.stop()
			h = start(t, two, "/mnt/r/"+kind+" "+kind+" sh wait 0 0")
			h.says("done")
			ask(t, one, "/mnt/r/"+kind+" "+kind+" sh try 0 0", "done")
			h.stop()
		}
	})
	t.Run("ranges", func(t *testing.T) {
		h := start(t, one, "/mnt/r/f fcntl ex try 0 100 /mnt/r/f fcntl un try 40 20 /mnt/r/f fcntl sh try 80 50")
		h.says("done\ndone\ndone")
		for line, want := range map[string]string{
			"ex try 40 20": "done", "ex try 39 1": "EAGAIN", "ex try 60 1": "EAGAIN", "sh try 80 10": "done", "ex try 129 1": "EAGAIN",
			"ex try 130 0": "done", "sh try 0 1": "EAGAIN",
		} {
			ask(t, two, "/mnt/r/f fcntl "+line, want)
		}
		h.stop()
	})
	t.Run("who waits gets it", func(t *testing.T) {
		h := start(t, one, "/mnt/r/w flock ex try 0 0")
		h.says("done")
		w := start(t, two, "/mnt/r/w flock ex wait 0 0")
		ask(t, one, "/mnt/r/w flock sh try 0 0", "EAGAIN")
		h.stop()
		w.says("done")
		ask(t, one, "/mnt/r/w flock ex try 0 0", "EAGAIN")
		w.stop()
		ask(t, one, "/mnt/r/w flock ex try 0 0", "done")
	})
	t.Run("deadlock", func(t *testing.T) {
		gate := start(t, two, "/mnt/r/gate fcntl ex try 0 0")
		gate.says("done")
		b := start(t, two, "/mnt/r/d fcntl ex try 1 1 /mnt/r/gate fcntl ex wait 0 0 /mnt/r/d fcntl ex wait 0 1")
		b.says("done")
		a := start(t, one, "/mnt/r/d fcntl ex try 0 1 /mnt/r/d fcntl ex wait 1 1")
		a.says("done")
		gate.stop()
		// Whoever of them asks last learns of it, and the other goes on.
		want := map[string]bool{"done\nEDEADLK|done\ndone\ndone": true, "done\ndone|done\ndone\nEDEADLK": true}
		deadline := time.After(patience)
		for !want[a.said()+"|"+b.said()] {
			select {
			case <-a.news:
			case <-b.news:
			case <-deadline:
				t.Fatalf("they said %q and %q", a.said(), b.said())
			}
		}
		a.stop()
		b.stop()
	})
	t.Run("the server is killed", func(t *testing.T) {
		h := start(t, one, "/mnt/r/k fcntl ex try 0 0")
		h.says("done")
		w := start(t, two, "/mnt/r/k fcntl ex wait 0 0")
		ask(t, two, "/mnt/r/k fcntl ex try 5 1", "EAGAIN")
		if err := server.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
		ask(t, two, "/mnt/r/k fcntl ex try 5 1", "EAGAIN")
		h.stop()
		w.says("done")
		w.stop()
	})
	t.Run("the server's machine goes down", func(t *testing.T) {
		h := start(t, one, "/mnt/r/m fcntl ex try 0 0")
		h.says("done")
		w := start(t, two, "/mnt/r/m fcntl ex wait 0 0")
		if err := server.RestartMachine(t.Context()); err != nil {
			t.Fatal(err)
		}
		ask(t, two, "/mnt/r/m fcntl ex try 5 1", "EAGAIN") // after the grace period
		h.stop()
		w.says("done")
		w.stop()
	})
	t.Run("a client loses power", func(t *testing.T) {
		h := start(t, one, "/mnt/r/p flock ex try 0 0")
		h.says("done")
		w := start(t, two, "/mnt/r/p flock ex wait 0 0")
		one.Kill()
		ask(t, two, "/mnt/r/p flock ex try 0 0", "EAGAIN")
		one.BootAgain(t)
		one.MountLocked(t, uml.Port, "/", "/mnt/r")
		w.says("done")
		w.stop()
	})
}

package pid1

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"krgimage/node/bootlog"
	"krgimage/node/control"
	"krgimage/node/retry"
)

func testMachine() *machine {
	log := slog.New(slog.NewTextHandler(io.Discard, nil))
	return &machine{log: log, down: make(chan Down, 1), timeline: bootlog.NewTimeline(log, retry.System{}, bootlog.Uptime, nil)}
}

func event(kind, code uint16, value uint32) []byte {
	b := make([]byte, inputEventSize)
	binary.NativeEndian.PutUint16(b[16:], kind)
	binary.NativeEndian.PutUint16(b[18:], code)
	binary.NativeEndian.PutUint32(b[20:], value)
	return b
}

func TestReadButton(t *testing.T) {
	const keyA, released = 30, 0
	for _, tc := range []struct {
		name   string
		events [][]byte
		want   string
	}{
		{"power", [][]byte{event(0, 0, 0), event(evKey, keyA, pressed), event(evKey, keyPower, pressed)}, bootlog.StagePoweroff},
		{"restart", [][]byte{event(evKey, keyRestart, pressed)}, bootlog.StageReboot},
		{"only released", [][]byte{event(evKey, keyPower, released)}, ""},
		{"another kind of event", [][]byte{event(4, keyPower, pressed)}, ""},
		{"half an event", [][]byte{event(evKey, keyPower, pressed)[:20]}, ""},
	} {
		if got := readButton(bytes.NewReader(bytes.Join(tc.events, nil))); got != tc.want {
			t.Errorf("%s: %q, want %q", tc.name, got, tc.want)
		}
	}
}

func TestWaitForSSH(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for _, say := range []string{"", "220 mail ESMTP\r\n", "SSH-2.0-test\r\nmore"} {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(conn, say)
			conn.Close()
		}
	}()
	banner, err := waitForSSH(context.Background(), l.Addr().String())
	if err != nil || banner != "SSH-2.0-test" {
		t.Errorf("banner %q, %v", banner, err)
	}
}

func TestWishes(t *testing.T) {
	hup, intr, kill := unix.WaitStatus(unix.SIGHUP), unix.WaitStatus(unix.SIGINT), unix.WaitStatus(unix.SIGKILL)
	for _, tc := range []struct {
		name string
		do   func(*machine)
		want string // stage, or "" for none
	}{
		{"reboot(2) restart in the container", func(m *machine) { m.containerEnded(hup) }, bootlog.StageReboot},
		{"reboot(2) power off in the container", func(m *machine) { m.containerEnded(intr) }, bootlog.StagePoweroff},
		{"the container's init is killed", func(m *machine) { m.containerEnded(kill) }, ""},
		{"the container's init exits", func(m *machine) { m.containerEnded(unix.WaitStatus(1 << 8)) }, ""},
		{"krg poweroff", func(m *machine) { _, _ = m.Handle(control.Request{Command: "poweroff"}) }, bootlog.StagePoweroff},
		{"krg reboot", func(m *machine) { _, _ = m.Handle(control.Request{Command: "reboot"}) }, bootlog.StageReboot},
		{"the first counts", func(m *machine) {
			_, _ = m.Handle(control.Request{Command: "reboot"})
			_, _ = m.Handle(control.Request{Command: "poweroff"})
		}, bootlog.StageReboot},
		{"unknown command", func(m *machine) {
			if _, err := m.Handle(control.Request{Command: "sing"}); err == nil {
				t.Error("unknown command accepted")
			}
		}, ""},
		{"ctrl-alt-del", func(m *machine) { signalled(t, m, unix.SIGINT) }, bootlog.StageReboot},
		{"SIGTERM", func(m *machine) { signalled(t, m, unix.SIGTERM) }, bootlog.StageReboot},
		{"SIGUSR1", func(m *machine) { signalled(t, m, unix.SIGUSR1) }, bootlog.StagePoweroff},
		{"SIGHUP", func(m *machine) { signalled(t, m, unix.SIGHUP) }, ""},
	} {
		m := testMachine()
		tc.do(m)
		got := ""
		select {
		case d := <-m.down:
			got = d.Stage
		default:
		}
		if got != tc.want {
			t.Errorf("%s: %q, want %q", tc.name, got, tc.want)
		}
	}
}

// signalled hands s to the signal loop and waits until that has seen it.
func signalled(t *testing.T, m *machine, s os.Signal) {
	t.Helper()
	ch := make(chan os.Signal)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- m.signals(ctx, ch) }()
	ch <- s
	ch <- unix.SIGCHLD // taken only when s has been handled
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestBackgroundStartsAgainAfterPanic(t *testing.T) {
	m := testMachine()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	calls := 0
	<-m.background(ctx, "x", func(context.Context) error {
		if calls++; calls == 1 {
			panic("first")
		}
		return nil
	})
	if calls != 2 {
		t.Errorf("%d calls, want 2", calls)
	}
	cancel()
	<-m.background(ctx, "y", func(context.Context) error { return errors.New("late") })
}

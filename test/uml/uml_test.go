package uml

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"krgimage/nfsroot/nfs"
)

func TestMain(m *testing.M) {
	os.Exit(Main(m, map[string]Program{"whoami": func(args []string) int {
		groups, err := os.Getgroups()
		fmt.Println(os.Getuid(), os.Getgid(), groups, err, args)
		return len(args)
	}}))
}

func TestGuests(t *testing.T) {
	Need(t)
	n := NewNet(t)
	dir, state := t.TempDir(), t.TempDir()
	server := n.StartServer(t, state, nfs.Export{Path: "/", Dir: dir})
	guests := n.BootAll(t, "one", "two")
	for _, g := range guests {
		g.Mount(t, Port, "/", "/mnt/root")
	}
	one, two := guests[0], guests[1]
	one.Shell(t, "echo hello >/mnt/root/file; mkdir /mnt/root/open; chmod 1777 /mnt/root/open")
	if got := two.Shell(t, "cat /mnt/root/file; hostname"); got != "hello\ntwo\n" {
		t.Errorf("the other guest reads %q", got)
	}
	if data, err := os.ReadFile(filepath.Join(dir, "file")); string(data) != "hello\n" {
		t.Errorf("on the machine the file has %q, %v", data, err)
	}

	job := Call("whoami", "a", "b")
	job.UID, job.GID, job.Groups = 1000, 1001, []uint32{1002}
	out, err := one.Run(t.Context(), job)
	var ee *ExitError
	if !errors.As(err, &ee) || ee.Code != 2 || out != "1000 1001 [1002] <nil> [a b]\n" {
		t.Errorf("a program: %q, %v", out, err)
	}
	if out, err := one.Run(t.Context(), Job{Args: []string{"/nonexistent"}}); err == nil || errors.As(err, &ee) && ee.Code == 0 {
		t.Errorf("a program that isn't there: %q, %v", out, err)
	}

	// The guest waits for a dead server, and goes on with a new one.
	server.Kill()
	result := make(chan error, 1)
	go func() {
		out, err := two.Run(t.Context(), Shell("echo again >/mnt/root/open/file; cat /mnt/root/file"))
		if err == nil && !strings.HasSuffix(out, "hello\n") {
			err = fmt.Errorf("it printed %q", out)
		}
		result <- err
	}()
	server.Start(t)
	if err := <-result; err != nil {
		t.Errorf("over a restart of the server: %v", err)
	}
	two.Unmount(t, "/mnt/root")
}

// Package uml gives tests a Linux NFS client that nobody here wrote, in seconds
// and without hardware acceleration: User-Mode Linux, Debian's kernel as a
// program (package user-mode-linux).
//
// A test makes a Net, a network namespace with a bridge; starts the NFS server
// in it, in the test's own process (Serve) or in one that can be killed
// (StartServer); boots Guests, which see the machine's own file system read-only
// as their root, so that they have its programs; mounts the server's tree in
// them with the options that nodes use; and runs jobs there: programs of the
// machine, or functions of the test binary.
//
// The test binary is the guests' init and the killable server too, so TestMain
// must be
//
//	func TestMain(m *testing.M) { os.Exit(uml.Main(m, programs)) }
//
// All of it needs root, for the namespace and for the server. Nothing outside
// the namespace is touched.
package uml

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Program is a function of the test binary that runs as a program of its own,
// in a guest or on the machine. It returns the exit status.
type Program func(args []string) int

// roles of the test binary, by argument 0 of the process.
const (
	roleInit     = "uml-init"
	roleServer   = "uml-nfs-server"
	rolePrograms = "uml-program:" // and the program's name
)

// initVariable tells the test binary that it is a guest's init: the kernel
// starts it with argument 0 of its own choice.
const initVariable = "KRG_UML_INIT"

// Main runs the tests, or what else the test binary is this time.
func Main(m *testing.M, programs map[string]Program) int {
	name, isProgram := strings.CutPrefix(os.Args[0], rolePrograms)
	switch {
	case isProgram:
		p := programs[name]
		if p == nil {
			fmt.Fprintf(os.Stderr, "the test binary has no program %q\n", name)
			return 127
		}
		return p(os.Args[1:])
	case os.Args[0] == roleServer:
		return serverMain(os.Args[1:])
	case os.Getpid() == 1 && os.Getenv(initVariable) != "":
		return initMain()
	}
	return m.Run()
}

// Need skips the test where guests can't run, with the reason; in CI it fails.
func Need(t testing.TB) {
	t.Helper()
	missing := ""
	if os.Geteuid() != 0 {
		missing = "root"
	} else if _, err := os.Stat("/dev/net/tun"); err != nil {
		missing = "/dev/net/tun"
	} else if _, err := kernel(); err != nil {
		missing = err.Error()
	}
	switch {
	case missing == "":
	case os.Getenv("CI") != "":
		t.Fatalf("User-Mode Linux needs %s", missing)
	default:
		t.Skipf("User-Mode Linux needs %s", missing)
	}
}

// kernel finds the kernel program.
func kernel() (string, error) {
	path, err := exec.LookPath("linux.uml")
	if err != nil {
		return "", fmt.Errorf("the Debian package user-mode-linux (%w)", err)
	}
	return filepath.EvalSymlinks(path)
}

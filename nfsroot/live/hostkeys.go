package live

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/renameio/v2"
	"golang.org/x/crypto/ssh"
)

// hostKey is the cluster's ssh identity: one ed25519 key for all nodes, since
// they are one system to who logs in, and made once, since a changed host key
// stops every client. One kind is enough for every OpenSSH since 6.5 and is
// the fastest to load.
type hostKey struct {
	private []byte // OpenSSH's PEM form
	public  string // "ssh-ed25519 AAAA... NAME"
}

const hostKeyFile = "ssh_host_ed25519_key"

// ensureHostKey reads the host key from dir (STATE/ssh) or makes it.
func ensureHostKey(dir, comment string) (hostKey, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return hostKey{}, err
	}
	file := filepath.Join(dir, hostKeyFile)
	private, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		private, err = newHostKey(comment)
		if err != nil {
			return hostKey{}, err
		}
		err = renameio.WriteFile(file, private, 0o600, renameio.WithStaticPermissions(0o600))
	}
	if err != nil {
		return hostKey{}, fmt.Errorf("ssh host key: %w", err)
	}
	signer, err := ssh.ParsePrivateKey(private)
	if err != nil {
		return hostKey{}, fmt.Errorf("ssh host key %s: %w\n  fix: bring it back from a backup, or remove it: a new one is made, and every client has to forget the old one (ssh-keygen -R)", file, err)
	}
	public := strings.TrimSpace(string(ssh.MarshalAuthorizedKey(signer.PublicKey()))) + " " + comment
	if err := os.Chmod(file, 0o600); err != nil {
		return hostKey{}, err
	}
	if err := renameio.WriteFile(file+".pub", []byte(public+"\n"), 0o644); err != nil {
		return hostKey{}, err
	}
	return hostKey{private, public}, nil
}

func newHostKey(comment string) ([]byte, error) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	block, err := ssh.MarshalPrivateKey(key, comment)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(block), nil
}

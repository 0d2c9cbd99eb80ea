package cli

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

// clientKey returns the file of the private key with which the head node's
// admin logs in (krgimage ssh), and its public half as an authorized_keys line.
// The pair is made at first use and never leaves the state directory.
func clientKey(state string) (file, public string, err error) {
	dir := filepath.Join(state, "ssh")
	file = filepath.Join(dir, "id_ed25519")
	data, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		data, err = makeKey(dir, file)
	}
	if err != nil {
		return "", "", fmt.Errorf("the head node's ssh key: %w", err)
	}
	signer, err := ssh.ParsePrivateKey(data)
	if err != nil {
		return "", "", fmt.Errorf("the head node's ssh key %s is damaged (%w): move it away and a new one is made", file, err)
	}
	line := strings.TrimSpace(string(ssh.MarshalAuthorizedKey(signer.PublicKey())))
	return file, line + " krgimage", nil
}

func makeKey(dir, file string) ([]byte, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	block, err := ssh.MarshalPrivateKey(private, "krgimage")
	if err != nil {
		return nil, err
	}
	data := pem.EncodeToMemory(block)
	return data, renameio.WriteFile(file, data, 0o600)
}

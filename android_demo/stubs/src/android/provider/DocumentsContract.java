package android.provider;

import android.net.Uri;

public final class DocumentsContract {
    private DocumentsContract() {}

    public static final class Document {
        public static final String COLUMN_DOCUMENT_ID = "document_id";
        public static final String COLUMN_DISPLAY_NAME = "_display_name";
        public static final String COLUMN_MIME_TYPE = "mime_type";
        public static final String MIME_TYPE_DIR = "vnd.android.document/directory";

        private Document() {}
    }

    public static String getTreeDocumentId(Uri documentUri) {
        throw new UnsupportedOperationException();
    }

    public static Uri buildChildDocumentsUriUsingTree(Uri treeUri, String parentDocumentId) {
        throw new UnsupportedOperationException();
    }

    public static Uri buildDocumentUriUsingTree(Uri treeUri, String documentId) {
        throw new UnsupportedOperationException();
    }
}
